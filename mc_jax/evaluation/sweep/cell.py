"""A cell of a sweep measured, and the file that tells of it."""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mc_jax
from mc_jax import config as configs
from mc_jax.data.store import TokenStore
from mc_jax.evaluation.core import measure
from mc_jax.evaluation.dial import turn
from mc_jax.evaluation.result import checkpoint_hash, commit_of
from mc_jax.evaluation.sums import COUNTED, Sums, Units
from mc_jax.evaluation.sweep.cost import costs_of
from mc_jax.evaluation.sweep.grid import Cell
from mc_jax.training.router_shares import RouterOnText, RouterShares, has_router
from mc_jax.training.run import Run
from mc_jax.training.step import split_model

KIND, VERSION = "cell of a sweep", 1
FIELDS = ("settings", "measurement", "costs", "command")


def name_of(cell: Cell, run: Run, store: TokenStore) -> str:
    """A cell's name: the hash of run, weights, settings and text, so that another result has another name."""
    settings = configs.to_flat_dict(cell.config)
    told = {
        "run": run.folder.name,
        "step": run.step,
        "checkpoint": checkpoint_hash(run),
        "tokenizer": run.dataset.tokenizer.fingerprint,
        "text": store.content_hash(),
        "model": {name: value for name, value in settings.items() if name.startswith("model.")},
        "settings": cell.settings(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]


def measure_cell(
    cell: Cell, run: Run, store: TokenStore, router: RouterShares | None, text: Sequence[str] = ()
) -> dict[str, Any]:
    """A cell's result as JSON values.

    Args:
      cell: how the run is read.
      run: as it was trained, on the current mesh.
      store: the text.
      router: what its routers read, as `router_of` found it.
      text: options of `mc-jax eval` that name the text; none for the run's held-out one.
    """
    turned = turn(run, cell.changes)
    compiling = _first_batch(turned, store, cell)
    measurement = measure(turned, store, cell.reads_by)
    return {
        "kind": KIND,
        "version": VERSION,
        "run": cell.run,
        "step": run.step,
        "is_own": cell.is_own,
        "settings": cell.settings(),
        "measurement": measurement.to_json(),
        "first_batch_seconds": compiling,
        "costs": {
            name: dataclasses.asdict(cost)
            for name, cost in costs_of(cell, store, run.dataset.tokenizer.vocab_size).items()
        },
        "router": None if router is None else router.to_json(),
        "command": cell.command(run.step, text),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version_of_mc_jax": importlib.metadata.version("mc-jax"),
        "commit": _commit(),
        "device": jax.local_devices()[0].device_kind,
        "devices": 1 if cell.mode == "stream" else jax.local_device_count(),
    }


def router_of(cell: Cell, run: Run, store: TokenStore) -> RouterShares | None:
    """What the routers read of a text in a cell's windows, whatever its mode; None where none is."""
    turned = turn(run, cell.changes)
    if not has_router(turned.config.model):
        return None
    graph, parameters = split_model(turned.model)
    return RouterOnText(graph, turned.config, store).measure(parameters)


def sums_of(values: dict[str, Any]) -> Sums:
    """The sums of a cell's file, by unit."""
    units = values["measurement"]["units"]
    arrays = {name: np.asarray(units[name])[:, None] for name in COUNTED}
    first = np.array([0, len(units["tokens"])])
    return Sums(**arrays, units=Units(block_length=units["block_length"], first=first))


def _first_batch(run: Run, store: TokenStore, cell: Cell) -> float:
    """Seconds until the first targets are scored, most of which go into compiling, if it was not yet."""
    started = time.perf_counter()
    scored = cell.reads_by.read(run.model, store, run.config.evaluation.batch_size)
    next(scored, None)
    return time.perf_counter() - started


@functools.cache
def _commit() -> str | None:
    return commit_of(Path(mc_jax.__file__).parents[1])

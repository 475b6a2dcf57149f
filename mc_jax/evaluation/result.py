"""A run's result as a file: what was measured, on which weights and text, by which code, where and when."""

import datetime
import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

import mc_jax
from mc_jax.data.files import write_json
from mc_jax.training.checkpoint.digest import hash_of_digests
from mc_jax.training.checkpoint.folder import CHECKPOINTS_FOLDER
from mc_jax.training.router_shares import RouterShares
from mc_jax.training.run import CONFIG_FILE, ParameterCounts, Run
from mc_jax.training.seal import make_seal

RESULT_FILE = "result.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_SECONDS_FOR_GIT = 10


def write_result(
    run: Run,
    held_out: dict[str, float] | None,
    metrics: list[dict[str, Any]],
    parameters: ParameterCounts,
    router: RouterShares | None,
) -> dict[str, Any]:
    """Write `result.json` into a run's folder, whole or not at all.

    Args:
      run: as it was read back.
      held_out: as `evaluate_held_out` measured it, and what the caches are worth; None: not measured.
      metrics: one dict a step, as `read_metrics` gives them.
      parameters: how many the model has, and how many were trained.
      router: what its routers read of held-out text; None: there is nothing of that kind.

    Returns:
      What it holds.
    """
    last = metrics[-1] if metrics else {}
    seal = make_seal(run.config, run.dataset)
    values = {
        "run": run.folder.name,
        "step": run.step,
        "parameters": parameters.model,
        "trained_parameters": parameters.trained,
        "held_out": held_out,
        "router": None if router is None else router.to_json(),
        "training": {name: last[name] for name in ("tokens", "loss", "bits_per_byte", "seconds") if last},
        "hashes": {
            "config": _hash([run.folder / CONFIG_FILE]),
            "checkpoint": checkpoint_hash(run),
            "tokenizer": seal["tokenizer"],
            "training_text": seal["training text"],
            "held_out_text": seal["held-out text"],
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(mc_jax.__file__).parents[1]),
        "versions": {
            "mc-jax": importlib.metadata.version("mc-jax"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(run.folder / RESULT_FILE, values)
    return values


def checkpoint_hash(run: Run) -> str | None:
    """SHA-256 of the digests of a run's checkpoint, and so of all its weights; None: an old one has none."""
    return hash_of_digests(run.folder / CHECKPOINTS_FOLDER / str(run.step))


def _hash(files: Sequence[epath.Path]) -> str | None:
    """SHA-256 of files, one after another; None where there are none."""
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def commit_of(folder: Path) -> str | None:
    """The git commit of a checkout, with "+" where files that git follows differ; None where it is none."""
    try:
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None  # installed somewhere within another repository
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return _git(folder, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=_SECONDS_FOR_GIT,
    )
    return done.stdout.strip()

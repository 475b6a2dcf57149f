"""The evaluation core: a model reads a text in some mode, and every target's loss is added up exactly."""

import functools
import math
import time

import numpy as np

from mc_jax.data.dataset import Dataset
from mc_jax.data.store import TokenStore
from mc_jax.data.targets import TargetCounts, target_counts
from mc_jax.data.tokenizer import Tokenizer
from mc_jax.evaluation.measurement import Measurement
from mc_jax.evaluation.modes import Mode
from mc_jax.evaluation.origin import origin_of
from mc_jax.evaluation.sums import Sums, units_of
from mc_jax.nn import LanguageModel
from mc_jax.training.run import Run


def measure(run: Run, store: TokenStore, mode: Mode) -> Measurement:
    """A run's result on a text, `evaluation.batch_size` windows at a time.

    On the current mesh, if there is one: then the run was loaded on it, and all its processes call this.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      store: the text, tokenized by the run's tokenizer.
      mode: how it is read.

    Raises:
      ValueError: another tokenizer's text, no target that the mode scores, or a loss that is not finite.
    """
    tokenizer = run.dataset.tokenizer
    if store.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the text was tokenized by another tokenizer than that of {run.folder}; "
            "prepare it with mc-jax prepare --tokenizer TOKENIZER.JSON of the run"
        )
    started = time.perf_counter()
    sums = add_up(run.model, store, tokenizer, mode, batch_size=run.config.evaluation.batch_size)
    seconds = time.perf_counter() - started
    return Measurement(
        origin=origin_of(run, text=store.content_hash()),
        mode=mode.name,
        settings=mode.settings(),
        sums=sums,
        edges=mode.edges,
        cache_bytes=mode.cache_bytes(run.model, store),
        seconds=seconds,
    )


def add_up(
    model: LanguageModel, store: TokenStore, tokenizer: Tokenizer, mode: Mode, *, batch_size: int
) -> Sums:
    """Sums over all targets that a mode scores, in float64 on the host: a novel has hundreds of thousands.

    Args:
      model: the language model.
      store: the documents.
      tokenizer: theirs.
      mode: how they are read.
      batch_size: windows read together.

    Raises:
      ValueError: there are no such targets, or their loss is not finite.
    """
    units = units_of(store, mode.first)
    shape = (len(units), max(1, len(mode.edges) - 1))
    nats = np.zeros(shape)
    tokens, text, words = (np.zeros(shape, np.int64) for _ in range(3))

    @functools.lru_cache(maxsize=batch_size)  # of the documents that are read side by side
    def counts_of(document: int) -> TargetCounts:
        return target_counts(store, document, tokenizer)

    for scored in mode.read(model, store, batch_size):
        counts = counts_of(scored.document)
        within = np.arange(len(scored.nats))
        places = scored.place + within
        buckets = np.zeros_like(within)
        if mode.edges:
            buckets = np.searchsorted(mode.edges, scored.position + within, side="right") - 1
        where = units.of(scored.document, places), buckets
        counted = store.is_scored(scored.document, scored.place, scored.place + len(places))
        for total, values in (
            (nats, scored.nats.astype(np.float64)),
            (tokens, counted),
            (text, counts.bytes[places] * counted),
            (words, counts.words[places] * counted),
        ):
            np.add.at(total, where, values)
    if not tokens.any():
        raise ValueError(
            f"no document has more than {mode.first} targets, from which on {mode.name} scores; "
            "give a longer text, or a shorter context"
        )
    if not math.isfinite(nats.sum()):
        raise ValueError(
            f"the loss on the text is {nats.sum() / tokens.sum()}, though all weights are finite: "
            "activations leave the range of numbers; train with a lower --training.learning-rate"
        )
    return Sums(nats=nats, tokens=tokens, bytes=text, words=words, units=units)


def held_out_text(dataset: Dataset, owner: object) -> TokenStore:
    """The held-out part of a run's data.

    Raises:
      ValueError: there is none; `owner` is named for it.
    """
    if dataset.held_out is None:
        raise ValueError(
            f"the data of {owner} has no held-out part; give one to mc-jax prepare with --held-out"
        )
    return dataset.held_out

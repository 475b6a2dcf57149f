"""What one sequence costs by formula: bytes of memory between tokens, FLOPs of a token.

Memory: the online state of each head (twice with momentum), the cached ones, and their router keys; an
attention layer's keys and values. What a convolution keeps of a few tokens is left out, as are counts.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from mc_jax.caching import Storage
from mc_jax.config import Config, ModelConfig
from mc_jax.data.store import TokenStore
from mc_jax.evaluation.dial import turned_config
from mc_jax.evaluation.sweep.grid import Cell
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS
from mc_jax.planning.formulas import flops_of, router_numbers, state_matrices
from mc_jax.training.run import activation_dtype, model_shapes

_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 4  # of each matrix of whole numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What reading a text costs, whatever the program makes of it."""

    memory_bytes: int
    """Kept of one sequence between tokens, at the longest that is read."""
    flops_per_token: float
    """Forward, of the mean token."""


def costs_of(cell: Cell, store: TokenStore, vocab_size: int) -> dict[str, Cost]:
    """The cell's own cost, and those of the dial's two ends on the same text in the same windows.

    Args:
      cell: how it is read.
      store: the text.
      vocab_size: entries of the tokenizer.

    Returns:
      "cell"; "recurrence", its caches off; "attention", a model as wide and deep whose layers all attend to
      everything before.
    """
    config, lengths = cell.config, _lengths(cell, store)
    attention = dataclasses.replace(config.model, layer_pattern=("attention",), attention_window=None)
    found = {
        "cell": _cost(config, lengths, cell.storage, vocab_size),
        "attention": _cost(dataclasses.replace(config, model=attention), lengths, Storage(), vocab_size),
    }
    if "memory" in config.model.layer_pattern:
        plain = turned_config(cell.trained, {"model.aggregation": "none"})
        plain = dataclasses.replace(plain, data=config.data)
        found["recurrence"] = _cost(plain, lengths, Storage(), vocab_size)
    return found


def memory_bytes(model: ModelConfig, length: int, storage: Storage, number_bytes: int) -> int:
    """Bytes that a model keeps of a sequence of `length` tokens, each number of `number_bytes`.

    With logarithmic segmentation it keeps the most groups that any prefix has.
    """
    matrices = state_matrices(model)
    state = sum(a * b for a, b in matrices)
    about = AGGREGATION_FACTS[model.aggregation]
    cached = length // model.segment_length if about.reads_cache else 0
    if storage.max_cached is not None:
        cached = min(cached, storage.max_cached)
    if model.segmentation == "logarithmic":
        cached = (cached + 1).bit_length() - 1
    kept = state * (number_bytes if storage.state_dtype is None else _BYTES[storage.state_dtype])
    if storage.state_dtype == "int8":
        kept += _SCALE_BYTES * len(matrices)
    kept += number_bytes * router_numbers(model)
    online = state * number_bytes * (2 if MEMORY_FACTS[model.memory].has_momentum else 1)
    of_layer = {
        "memory": model.num_heads * (online + cached * kept),
        "attention": 2 * model.model_dim * length * number_bytes,
        "window": 2 * model.model_dim * min(length, model.attention_window or length) * number_bytes,
    }
    repeats = model.num_layers // len(model.layer_pattern)
    return repeats * sum(of_layer[kind] for kind in model.layer_pattern)


def _lengths(cell: Cell, store: TokenStore) -> np.ndarray:
    """Tokens of the sequences that are read: whole documents, or of windows one."""
    pairs = np.diff(store.offsets) + 1
    if cell.mode == "stream":
        return pairs
    return np.minimum(pairs.max(keepdims=True), cell.config.data.context_length)


def _cost(config: Config, lengths: np.ndarray, storage: Storage, vocab_size: int) -> Cost:
    shapes = _shapes(config.model, dataclasses.replace(config, data=type(config.data)()), vocab_size)
    total = 0.0
    for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
        data = dataclasses.replace(config.data, context_length=int(length))
        flops = flops_of(dataclasses.replace(config, data=data), shapes, places=storage.max_cached)
        total += flops.forward * int(length) * int(count)
    number_bytes = activation_dtype(config).itemsize
    return Cost(
        memory_bytes=memory_bytes(config.model, int(lengths.max()), storage, number_bytes),
        flops_per_token=total / float(lengths.sum()),
    )


@functools.lru_cache(maxsize=64)
def _shapes(model: ModelConfig, config: Config, vocab_size: int) -> Any:
    """The shapes of a model's parameters, which no window changes."""
    return model_shapes(dataclasses.replace(config, model=model), vocab_size)[1]

"""What a router reads of held-out text: how much of it cached memories, which, and how evenly.

A token's gates, divided by their sum, are its shares; where cached memories are weighed with a null, their
gates are, and the null has what they leave. Means are over the tokens that see at least one cached memory,
in a few windows that are spread evenly over the text and always the same ones.

Shapes: B windows, T tokens, L layers with a memory, H heads, N cached states, k states that a token selects,
D ranges of distance.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import entr

from mc_jax.caching.aggregations import Gates, Selection, shares_of
from mc_jax.config import Config, ModelConfig
from mc_jax.data.store import TokenStore
from mc_jax.data.windows import spread_sequences
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.parallel import has_mesh, local_rows, on_mesh
from mc_jax.parallel.compiler import compiler_options
from mc_jax.parallel.rules import size_of
from mc_jax.training.step import Parameters, merge_model

_WINDOWS = 4


type _Array = np.ndarray | jax.Array


class Reading(NamedTuple):
    """Means over tokens, of each layer and head; sums, where they are computed."""

    cached: _Array
    """[L, H], share of the cached memories together."""
    entropy: _Array
    """[L, H], entropy of a token's shares, nats."""
    relative_entropy: _Array
    """[L, H], the same over the entropy of equal shares, log(1 + segments that ended before the token)."""
    by_distance: _Array
    """[L, H, D], share of the cached memories in each range of distance; they add up to `cached`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterShares:
    """What the routers of a model read of a text."""

    layers: tuple[int, ...]
    """The numbers, from 1, of the L layers that have a memory."""
    segment_length: int
    """Tokens of a segment."""
    tokens: int
    """Tokens that see at least one cached memory, the ones that means are over."""
    distances: tuple[tuple[int, int], ...]
    """First and last distance of the D ranges, in segments back from the token's own; the latest is at 1."""
    reading: Reading
    """What was read."""
    even_cached: float
    """What `reading.cached` would be if every token weighed all its memories alike."""
    even_by_distance: tuple[float, ...]
    """The same of `reading.by_distance`, D numbers."""

    def metrics(self) -> dict[str, float]:
        """Scalars for a run's metrics: means over layers and heads, and each layer's over heads."""
        share, entropy = self.reading.cached.mean(axis=1), self.reading.entropy.mean(axis=1)
        values = {
            "router_cached_share": float(share.mean()),
            "router_entropy": float(entropy.mean()),
            "router_relative_entropy": float(self.reading.relative_entropy.mean()),
        }
        for place, layer in enumerate(self.layers):
            values[f"router_cached_share_layer_{layer}"] = float(share[place])
            values[f"router_entropy_layer_{layer}"] = float(entropy[place])
        return values

    def to_json(self) -> dict[str, Any]:
        """JSON values: means over heads, of each layer, and the heads' own numbers beside them."""
        reading = self.reading
        return {
            "tokens": self.tokens,
            "segment_length": self.segment_length,
            "distances": [list(one) for one in self.distances],
            "even_cached_share": self.even_cached,
            "even_share_by_distance": list(self.even_by_distance),
            "layers": [
                {
                    "layer": layer,
                    "cached_share": float(reading.cached[place].mean()),
                    "entropy": float(reading.entropy[place].mean()),
                    "relative_entropy": float(reading.relative_entropy[place].mean()),
                    "share_by_distance": reading.by_distance[place].mean(axis=0).tolist(),
                    "cached_share_of_heads": reading.cached[place].tolist(),
                    "entropy_of_heads": reading.entropy[place].tolist(),
                }
                for place, layer in enumerate(self.layers)
            ],
        }


class RouterOnText:
    """Measures what a model's routers read of a store; compiled once, for the current mesh if there is one.

    All processes of a mesh must call it alike. The windows, and so the result, do not depend on the mesh.

    Args:
      graph: the model's static part.
      config: the run's settings; its model has a router.
      store: the text.
    """

    def __init__(self, graph: nnx.GraphDef, config: Config, store: TokenStore):
        model, length = config.model, config.data.context_length
        self._model = model
        sequences = spread_sequences(store, length=length, count=_WINDOWS)
        devices = size_of("batch")
        self._batch_size = -(-_WINDOWS // devices) * devices
        inputs = np.full((self._batch_size, length), store.separator_id, np.int32)
        seen = np.zeros((self._batch_size, length), np.float32)
        for row, sequence in enumerate(sequences):
            inputs[row, : len(sequence)] = sequence
            seen[row, model.segment_length : len(sequence)] = 1.0
        self._batch = {"inputs": inputs, "seen": seen}
        self._distances = distances_to((length - 1) // model.segment_length)
        has_null = AGGREGATION_FACTS[model.aggregation].has_null

        def read(parameters: Parameters, inputs: jax.Array, seen: jax.Array) -> Reading | None:
            def of_layer(gates: Gates | Selection) -> Reading:
                return _sums(gates, seen, model.segment_length, self._distances, has_null=has_null)

            return merge_model(graph, parameters).map_gates(inputs, of_layer)

        # Every process reads what all windows give.
        whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P()) if has_mesh() else None
        options = compiler_options() if has_mesh() else None
        self._read = jax.jit(read, out_shardings=whole, compiler_options=options)

    def measure(self, parameters: Parameters) -> RouterShares | None:
        """What is read; None where no window is longer than a segment, so that there is nothing to read."""
        tokens = self._batch["seen"].sum(axis=0)
        count = int(tokens.sum())
        if not count:
            return None
        batch: Any = self._batch
        if has_mesh():
            rows = local_rows(self._batch_size)
            batch = on_mesh({name: values[rows] for name, values in batch.items()}, self._batch_size)
        sums = self._read(parameters, batch["inputs"], batch["seen"])
        assert sums is not None, "a model with a router has gates"
        ended = np.arange(len(tokens)) // self._model.segment_length
        even = [
            float(tokens @ (np.clip(ended - first + 1, 0, last - first + 1) / (ended + 1))) / count
            for first, last in self._distances
        ]
        return RouterShares(
            layers=memory_layers(self._model),
            segment_length=self._model.segment_length,
            tokens=count,
            distances=self._distances,
            reading=Reading(*(np.asarray(total, np.float64) / count for total in sums)),
            even_cached=sum(even),
            even_by_distance=tuple(even),
        )


def has_router(model: ModelConfig) -> bool:
    """Whether a model weighs its memories token by token."""
    return "memory" in model.layer_pattern and AGGREGATION_FACTS[model.aggregation].uses_router


def memory_layers(model: ModelConfig) -> tuple[int, ...]:
    """The numbers, from 1, of the layers that have a memory."""
    pattern = model.layer_pattern
    return tuple(layer + 1 for layer in range(model.num_layers) if pattern[layer % len(pattern)] == "memory")


def distances_to(farthest: int) -> tuple[tuple[int, int], ...]:
    """Ranges of distance up to the farthest, each twice as wide as the last: 1, 2, 3 to 4, 5 to 8, ..."""
    ranges, first, last = [], 1, 1
    while first <= farthest:
        ranges.append((first, min(last, farthest)))
        first, last = last + 1, 2 * last
    return tuple(ranges)


def _sums(
    gates: Gates | Selection,
    seen: jax.Array,
    segment_length: int,
    distances: tuple[tuple[int, int], ...],
    *,
    has_null: bool,
) -> Reading:
    """Sums over tokens, [H] and by distance [H, D], of one layer.

    Args:
      gates: of all tokens; a selection is not spread out over all states.
      seen: [B, T], 1 at tokens that count.
      segment_length: tokens of a segment.
      distances: the D ranges.
      has_null: the cached memories are weighed with a null, and not with the online memory.
    """
    cached, rest = shares_of(gates, has_null=has_null)  # [B, T, H, N or k], [B, T, H]
    ended = jnp.arange(seen.shape[1], dtype=jnp.int32) // segment_length  # [T]
    if isinstance(gates, Selection):
        states = gates.indices
    else:
        states = jnp.arange(cached.shape[-1], dtype=jnp.int32)[None, None, None]
    distance = ended[None, :, None, None] - states  # [1 or B, T, 1 or H, N or k]
    entropy = entr(rest) + jnp.sum(entr(cached), axis=-1)
    even = jnp.log1p(jnp.maximum(ended, 1).astype(entropy.dtype))

    def over_tokens(values: jax.Array) -> jax.Array:
        """[B, T, H] -> [H], of the tokens that count; what others read may be NaN."""
        return jnp.sum(jnp.where(seen[..., None] > 0, values, 0), axis=(0, 1))

    by_distance = [
        over_tokens(jnp.sum(jnp.where((distance >= first) & (distance <= last), cached, 0), axis=-1))
        for first, last in distances
    ]
    return Reading(
        cached=over_tokens(jnp.sum(cached, axis=-1)),
        entropy=over_tokens(entropy),
        relative_entropy=over_tokens(entropy / even[None, :, None]),
        by_distance=jnp.stack(by_distance, axis=-1),
    )

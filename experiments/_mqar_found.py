"""Whether the routers of a trained model find the segment that holds what is asked.

Shapes: B rows, T tokens, L layers, H heads, N segments of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.data.mqar import IGNORED, MqarBatch
from mc_jax.training.step import merge_model

_SURE = 30.0
"""The score of a segment that is forced, where all other memories have 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a model's routers find, of the answers whose pair lies in a segment that has ended."""

    largest: list[float]
    """Share of these for which that segment has the largest gate of the cached ones, by layer and head."""
    read: list[float]
    """Share of these for which it is read at all, by layer and head."""
    forced: float | None
    """Accuracy, on all answers, of the last layer made to read that segment alone; None where the memory's
    keys are pooled, beside which nothing can be told."""


class Asked(NamedTuple):
    """Where the pair that a token asks for was written."""

    segment: np.ndarray
    """Its number [B, T]."""
    is_cached: np.ndarray
    """A value is asked, and the segment has ended [B, T]."""


def asked_of(batch: MqarBatch, segment_length: int) -> Asked:
    """Where the answers are, in rows whose pairs come first and in which nothing else looks like a key."""
    tokens = batch.tokens
    first = np.argmax(tokens[:, :, None] == tokens[:, None, :], axis=2)
    segment, own = first // segment_length, np.arange(tokens.shape[1]) // segment_length
    return Asked(segment, (batch.labels != IGNORED) & (segment < own))


def chance(asked: Asked, segment_length: int) -> float:
    """Share of the answers in ended segments that are found by who reads any cached one."""
    ended = np.arange(asked.segment.shape[1]) // segment_length
    return float(np.mean(1 / np.broadcast_to(ended, asked.segment.shape)[asked.is_cached]))


def found_by(graph: Any, parameters: Any, batch: MqarBatch, segment_length: int) -> dict[str, Any]:
    """Fields of `Found` as arrays, in a traced program.

    Args:
      graph: the static part of a model with two mixers that have a router, `first` and `second`, and a method
        `read` from tokens to logits and gates.
      parameters: its weights.
      batch: rows, as of `asked_of`.
      segment_length: tokens of a segment.
    """
    asked = asked_of(batch, segment_length)
    segments = -(-batch.tokens.shape[1] // segment_length)
    model = merge_model(graph, parameters)
    hits = [_hits(gates, asked, segments) for gates in model.read(batch.tokens, None)[1]]
    largest, read = (jnp.concatenate(of_layers) for of_layers in zip(*hits, strict=True))
    forced = None
    if model.second.router_key is not None:
        _force(model.second, asked, segment_length)
        right = jnp.argmax(model.read(batch.tokens, None)[0], axis=-1) == batch.labels
        forced = jnp.sum(right) / np.sum(batch.labels != IGNORED)
    return {"largest": largest, "read": read, "forced": forced}


def _hits(gates: Gates | Selection, asked: Asked, segments: int) -> tuple[jax.Array, jax.Array]:
    """Shares of the answers in ended segments of which the gate is the largest, and not 0: [H] each."""
    cached = (gates.dense(segments) if isinstance(gates, Selection) else gates).cached
    wanted = jnp.asarray(asked.segment)[..., None]
    gate = jnp.take_along_axis(cached, wanted[..., None], axis=-1)[..., 0]
    counted = jnp.asarray(asked.is_cached)[..., None]

    def share(hit: jax.Array) -> jax.Array:
        return jnp.sum(hit & counted, axis=(0, 1)) / jnp.sum(counted)

    return share(jnp.argmax(cached, axis=-1) == wanted), share(gate > 0)


def _force(mixer: Any, asked: Asked, segment_length: int) -> None:
    """Make a mixer read the wanted segments alone, where they are cached; elsewhere its router is as it was.

    Beside its own, queries and keys have a number for each segment: a key is 1 in that of its own segment, so
    that a segment's mean is, and a query that asks is large in that of the wanted one.
    """
    told = jnp.asarray(asked.is_cached)[..., None]
    own = np.arange(asked.segment.shape[1]) // segment_length
    names = np.arange(own[-1] + 1)
    wanted = jnp.where(told, _SURE * (asked.segment[..., None] == names), 0.0)
    names = jnp.broadcast_to((own[:, None] == names).astype(wanted.dtype), wanted.shape)
    online_logit = mixer.online_logit
    heads = mixer.num_heads
    mixer.router_query = _beside(mixer.router_query, heads, wanted, ~told)
    mixer.router_key = _beside(mixer.router_key, heads, names, jnp.ones_like(told))
    mixer.online_logit = lambda x: jnp.where(told, 0.0, online_logit(x))


def _beside(own: Callable, heads: int, more: jax.Array, kept: jax.Array) -> Callable:
    """A map of inputs [B, T, D] with `more` [B, T, N] in each head, and its own numbers where those count."""

    def both(x: jax.Array) -> jax.Array:
        numbers = own(x).reshape(*x.shape[:-1], heads, -1)
        numbers = jnp.where(kept[..., None], numbers, 0.0)
        told = jnp.broadcast_to(more[:, :, None], (*numbers.shape[:-1], more.shape[-1]))
        return jnp.concatenate([numbers, told], axis=-1).reshape(*x.shape[:-1], -1)

    return both

"""The small interface through which caching knows a memory, and the memories whose state is a matrix.

Shapes: B batch, T tokens, S segments, H heads, K key dim, V value dim, N states.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax

from pallas_kernels import chunk_memory, gated_state_read, memory_step
from pallas_kernels._state import OnlineState, Weights


class Coefficients(NamedTuple):
    """Scalars per token and head: [batch, length, heads], or [batch, heads] in decoding. None: neutral."""

    retention: jax.Array | None = None
    """a_t in (0, 1], how much of the memory stays; neutral 1."""
    momentum: jax.Array | None = None
    """m_t in [0, 1), how much of the last update's momentum stays; neutral 0."""
    step: jax.Array | None = None
    """h_t > 0, the size of the write; neutral 1."""
    previous_step: jax.Array | None = None
    """p_t, the size of the previous token's second write; neutral 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a row of tokens is cut: static, shared by all its layers."""

    segment_length: int
    segment_init: str
    chunk_length: int
    implementation: str | None = None


class MemoryRun(NamedTuple):
    """What a memory leaves after it has been run over rows of tokens."""

    reads: jax.Array
    """The online memory read by each token's query [B, T, H, V]."""
    segment_states: Weights
    """The state at each segment's end [B, S, H, ...]."""
    final: OnlineState
    """All that is needed to go on with the next token."""


class Memory(Protocol):
    """A recurrence: how tokens are written to a memory, how a state is queried (MATH.md section 1).

    A read is linear in the gates: `reads * online_gate + read(q, gates, states)` is the weighted sum of
    queried memories, to which `skip` adds what all memories share.
    """

    coefficients: tuple[str, ...]
    """Names of the `Coefficients` it uses; any other one is an error."""

    def run(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        layout: Layout,
        *,
        initial_state: Weights | None,
        document_ids: jax.Array | None,
        lengths: jax.Array | None,
    ) -> MemoryRun:
        """Write and query all tokens [B, T, H, dim]; the states at the segments' ends."""
        ...

    def step(
        self,
        state: OnlineState,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        chunk_start: jax.Array,
    ) -> tuple[jax.Array, OnlineState]:
        """Write one token a row [B, H, dim], then query; chunk_start [B] marks the first of a chunk."""
        ...

    def read(self, q: jax.Array, gates: jax.Array, states: Weights) -> jax.Array:
        """sum_n gates[..., n] M_n(q) without the skip: [B, T, H, V] from gates [B, T, H, N]."""
        ...

    def skip(self, q: jax.Array) -> jax.Array | None:
        """What every memory adds to its read whatever its state, counted once; None for a matrix."""
        ...


@dataclasses.dataclass(frozen=True)
class MatrixMemory:
    """A memory whose state is a matrix [K, V] that is read as q M; `rule` is one of `chunk_memory`'s."""

    rule: str
    coefficients: tuple[str, ...]

    def run(self, q, k, v, coefficients, layout, *, initial_state, document_ids, lengths) -> MemoryRun:
        """See `Memory.run`."""
        return MemoryRun(
            *chunk_memory(
                q,
                k,
                v,
                rule=self.rule,
                **coefficients._asdict(),
                segment_length=layout.segment_length,
                segment_init=layout.segment_init,
                chunk_length=layout.chunk_length,
                initial_state=initial_state,
                document_ids=document_ids,
                lengths=lengths,
                implementation=layout.implementation,
            )
        )

    def step(self, state, q, k, v, coefficients, chunk_start) -> tuple[jax.Array, OnlineState]:
        """See `Memory.step`."""
        return memory_step(state, q, k, v, rule=self.rule, **coefficients._asdict(), chunk_start=chunk_start)

    def read(self, q, gates, states) -> jax.Array:
        """See `Memory.read`."""
        return gated_state_read(q, gates, states)

    def skip(self, q) -> None:
        """A matrix adds nothing of its own."""
        return None

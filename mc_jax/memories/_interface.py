"""The small interface through which caching knows a memory.

Shapes: B batch, T tokens, S segments, H heads, K key dim, V value dim, N states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

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
    """How rows of tokens are cut, and what they start from."""

    segment_length: int
    segment_init: str
    chunk_length: int
    implementation: str | None
    initial_state: Weights | None
    """[H, ...] or [B, H, ...]; None: zeros."""
    document_ids: jax.Array | None
    """[B, T]; None: one document a row."""
    lengths: jax.Array | None
    """[B]: tokens at and past it are not written; None: all are."""
    start: OnlineState | None = None
    """What the first token goes on from, at a segment's start; documents still start from the initial state.
    None: that too."""

    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of an op."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class MemoryRun(NamedTuple):
    """What a memory leaves after it has been run over rows of tokens."""

    reads: jax.Array
    """The online memory read by each token's query, without `skip` [B, T, H, V]."""
    segment_states: Weights
    """The state at each segment's end [B, S, H, ...]."""
    final: OnlineState
    """All that is needed to go on with the next token."""


class Response(NamedTuple):
    """How a run changes with the matrix that it starts from, were that another one by dM [B, H, K, V]."""

    queries: jax.Array
    """[B, T, H, K] in q's dtype: a token's read changes by queries_t dM."""
    states: jax.Array
    """[B, S, H, K, K], or numbers [B, S, H] that stand for multiples of the identity: a state changes by
    states_s dM."""


class Memory(Protocol):
    """A recurrence: how tokens are written to a memory, how a state is queried (docs/math.md section 1).

    Reads leave out what a memory adds whatever its state (`skip`), so that a weighted sum of reads counts
    it once.
    """

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the `Coefficients` it uses; any other one is an error."""
        ...

    @property
    def takes_gradients(self) -> bool:
        """Whether a chunk is written by gradients at one state, so that it holds tokens of one document."""
        ...

    def run(
        self, q: jax.Array, k: jax.Array, v: jax.Array, coefficients: Coefficients, layout: Layout
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

    def read(self, q: jax.Array, gates: jax.Array, states: Weights, segment_length: int | None) -> jax.Array:
        """sum_n gates[..., n] M_n(q): [B, T, H, V] from gates [B, T, H, N] and states [B, N, H, ...].

        A `segment_length` promises that token t reads only states n < t // segment_length. States that
        several tokens read are finite.
        """
        ...

    def read_selected(self, q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
        """sum_j gates[..., j] M_indices[..., j](q), each token its own few states [B, T, H, k].

        States that several tokens read are finite.
        """
        ...

    def skip(self, q: jax.Array) -> jax.Array | None:
        """What every memory adds to its read whatever its state; None for a matrix."""
        ...


@runtime_checkable
class MixableMemory(Memory, Protocol):
    """A memory for which mixing weights is not the same as mixing reads: one that is not linear in them."""

    def run_mixed(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        layout: Layout,
        online_gate: jax.Array,
        gates: jax.Array,
        states: Weights,
        segment_length: int | None,
    ) -> jax.Array:
        """Query, for each token, the memory whose weights are the gated sum of online and cached ones.

        A `segment_length` promises what it does for `read`.
        """
        ...

    def step_mixed(
        self,
        state: OnlineState,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        chunk_start: jax.Array,
        online_gate: jax.Array,
        gates: jax.Array,
        states: Weights,
    ) -> tuple[jax.Array, OnlineState]:
        """The same for one token a row: gates [B, H, N]."""
        ...


@runtime_checkable
class AffineMemory(Memory, Protocol):
    """A memory whose reads and states are affine in the matrix that a run starts from.

    A run of it need not wait for that matrix.
    """

    def run_with_response(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        layout: Layout,
        goes_on: jax.Array,
        previous: tuple[jax.Array, jax.Array],
    ) -> tuple[MemoryRun, Response]:
        """The same as `run` over whole segments, with the response to another start than the initial state.

        Tokens that go on with the document of the token before the first [B, T], bool, alone respond;
        `previous` is that token's key [B, H, K] and value [B, H, V], for a memory that writes it again.
        """
        ...


@runtime_checkable
class DecodableMemory(Memory, Protocol):
    """A memory that writes a token, reads, and appends its state to the cached ones, all at once."""

    def decode(
        self,
        state: OnlineState,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        chunk_start: jax.Array,
        online_gate: jax.Array,
        gates: jax.Array,
        indices: jax.Array,
        states: Weights,
        slot: jax.Array,
    ) -> tuple[jax.Array, OnlineState, Weights]:
        """Write, then query online and selected states [B, H, k]; put the state in slot [B], -1 nowhere."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A recurrence and the kinds of state it is defined on."""

    matrix: Memory
    mlp: Callable[[str], MixableMemory] | None = None
    """The MLP memory of a branch; None where the rule is about a matrix."""

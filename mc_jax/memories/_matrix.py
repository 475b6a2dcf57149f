"""Memories whose state is a matrix M [K, V], read as q M: one op, four rules."""

import dataclasses

import jax

from mc_jax.memories._interface import Coefficients, Layout, MemoryRun
from pallas_kernels import chunk_memory, decode_step, gated_state_read, memory_step, routed_state_read
from pallas_kernels._state import OnlineState, Weights


@dataclasses.dataclass(frozen=True)
class MatrixMemory:
    """A rule of `pallas_kernels.chunk_memory`; see `DecodableMemory` for the methods."""

    rule: str
    coefficients: tuple[str, ...]
    takes_gradients: bool = False

    def run(
        self, q: jax.Array, k: jax.Array, v: jax.Array, coefficients: Coefficients, layout: Layout
    ) -> MemoryRun:
        """Write and query all tokens."""
        return MemoryRun(
            *chunk_memory(q, k, v, rule=self.rule, **coefficients._asdict(), **layout.arguments())
        )

    def step(
        self,
        state: OnlineState,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        chunk_start: jax.Array,
    ) -> tuple[jax.Array, OnlineState]:
        """Write and query one token a row."""
        return memory_step(state, q, k, v, rule=self.rule, **coefficients._asdict(), chunk_start=chunk_start)

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
    ) -> tuple[jax.Array, OnlineState, jax.Array]:
        """Write and query one token a row, with the selected states, and append."""
        assert isinstance(states, jax.Array)
        return decode_step(
            state,
            q,
            k,
            v,
            states,
            gates,
            indices,
            online_gate=online_gate,
            slot=slot,
            rule=self.rule,
            **coefficients._asdict(),
            chunk_start=chunk_start,
        )

    def read(self, q: jax.Array, gates: jax.Array, states: Weights, segment_length: int | None) -> jax.Array:
        """The gated sum of all states' reads."""
        return gated_state_read(q, gates, states, segment_length=segment_length, finite=True)

    def read_selected(self, q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
        """The gated sum of the selected states' reads."""
        return routed_state_read(q, gates, indices, states, finite=True)

    def skip(self, q: jax.Array) -> None:
        """A matrix adds nothing of its own."""
        return None

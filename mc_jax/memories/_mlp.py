"""Memories whose state is an MLP: M(x) = x + branch(gelu(x W_in) W_out) (MC eq. 30, 34)."""

import dataclasses
from typing import Any

import jax

from mc_jax.memories._interface import Coefficients, Layout, MemoryRun
from pallas_kernels import deep_memory, deep_memory_step, gated_state_read, routed_state_read
from pallas_kernels._branch import Branch
from pallas_kernels._state import OnlineState, Weights, state_dtype


@dataclasses.dataclass(frozen=True)
class MlpMemory:
    """An objective of `pallas_kernels.deep_memory`; see `Memory` and `MixableMemory` for the methods."""

    objective: str
    coefficients: tuple[str, ...]
    branch: str = "bounded"
    """The form of z = gelu(x W_in) W_out: "bounded" or "plain"."""

    @property
    def takes_gradients(self) -> bool:
        """All of them do."""
        return True

    def run(
        self, q: jax.Array, k: jax.Array, v: jax.Array, coefficients: Coefficients, layout: Layout
    ) -> MemoryRun:
        """Write and query all tokens; reads are those of the branch."""
        found = deep_memory(
            q,
            k,
            v,
            objective=self.objective,
            branch=self.branch,
            **coefficients._asdict(),
            **layout.arguments(),
        )
        return MemoryRun(*found[:3])

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
        found = deep_memory_step(
            state,
            q,
            k,
            v,
            objective=self.objective,
            branch=self.branch,
            **coefficients._asdict(),
            chunk_start=chunk_start,
        )
        return found[0], found[1]

    def read(self, q: jax.Array, gates: jax.Array, states: Weights, segment_length: int | None) -> jax.Array:
        """The gated sum of all states' branches."""
        return gated_state_read(
            q, gates, states, branch=self.branch, segment_length=segment_length, finite=True
        )

    def read_selected(self, q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
        """The gated sum of the selected states' branches."""
        return routed_state_read(q, gates, indices, states, branch=self.branch, finite=True)

    def skip(self, q: jax.Array) -> jax.Array:
        """M(q) = q + branch."""
        return q

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
        """Mix layer by layer, so that no weights are built per token (MC eq. 14-15).

        hidden = gelu(sum_i g_i q W_in^i), then the branch of sum_i g_i hidden W_out^i. The tokens are written
        a second time: the first time gave the states that are mixed in here.
        """
        w_in, w_out = states
        cached = gated_state_read(q, gates, w_in, segment_length=segment_length, finite=True)
        found: Any = deep_memory(
            q,
            k,
            v,
            objective=self.objective,
            branch=self.branch,
            hidden_bias=cached,
            hidden_gate=online_gate,
            **coefficients._asdict(),
            **layout.arguments(),
        )
        online, hidden = found[0], found[-1]
        cached = gated_state_read(hidden, gates, w_out, segment_length=segment_length, finite=True)
        return q + self._branch_of_mixture(online, cached)

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
        """The same for one token a row."""
        w_in, w_out = states
        cached = gated_state_read(q[:, None], gates[:, None], w_in)[:, 0]
        found: Any = deep_memory_step(
            state,
            q,
            k,
            v,
            objective=self.objective,
            branch=self.branch,
            hidden_bias=cached,
            hidden_gate=online_gate,
            **coefficients._asdict(),
            chunk_start=chunk_start,
        )
        online, state, hidden = found[0], found[1], found[-1]
        cached = gated_state_read(hidden[:, None], gates[:, None], w_out)[:, 0]
        return q + self._branch_of_mixture(online, cached), state

    def _branch_of_mixture(self, online: jax.Array, cached: jax.Array) -> jax.Array:
        """The branch of z = online + cached [..., V], in their dtype."""
        dtype = state_dtype(online)
        z = online.astype(dtype) + cached.astype(dtype)
        return Branch(self.branch).of(z).astype(online.dtype)

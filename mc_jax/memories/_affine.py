"""Matrix memories that are affine in the matrix they start from: M_t = (a run from anywhere) + A_t dM.

So a run need not wait for the matrix that it goes on from: what that changes is added once it is known. For
linear and swla A_t is a number, what retention leaves; for delta a matrix [K, K].

Shapes: B batch, T tokens, S segments, L segment length, H heads, K key dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.memories._interface import Coefficients, Layout, MemoryRun, Response
from mc_jax.memories._matrix import MatrixMemory
from pallas_kernels._state import state_dtype

type Token = tuple[jax.Array, jax.Array]
"""Key [B, H, K] and value [B, H, V]."""


@dataclasses.dataclass(frozen=True)
class DecayingMemory(MatrixMemory):
    """Linear and swla; see `AffineMemory` for the method."""

    def run_with_response(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        layout: Layout,
        goes_on: jax.Array,
        previous: Token,
    ) -> tuple[MemoryRun, Response]:
        """Run, with swla's write of the previous token, and tell what retention leaves of the start."""
        dtype = state_dtype(q)
        run = self.run(q, k, v, coefficients, layout)
        left_BTH = jnp.ones((*q.shape[:2], 1), dtype)
        if coefficients.retention is not None:
            left_BTH = coefficients.retention.astype(dtype)
        if coefficients.previous_step is not None:
            late = jax.lax.cumprod(left_BTH.at[:, 0].set(1), axis=1)
            late = jnp.where(goes_on[..., None], late, 0) * coefficients.previous_step[:, :1].astype(dtype)
            run = _written_before(run, q, late, previous, layout.segment_length)
        left_BTH = jnp.where(goes_on[..., None], jax.lax.cumprod(left_BTH, axis=1), 0)
        left_BTH = jnp.broadcast_to(left_BTH, q.shape[:3])
        queries = (left_BTH[..., None] * q.astype(dtype)).astype(q.dtype)
        return run, Response(queries, left_BTH[:, layout.segment_length - 1 :: layout.segment_length])


@dataclasses.dataclass(frozen=True)
class DeltaMemory(MatrixMemory):
    """Delta; see `AffineMemory` for the method."""

    def run_with_response(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        coefficients: Coefficients,
        layout: Layout,
        goes_on: jax.Array,
        previous: Token,
    ) -> tuple[MemoryRun, Response]:
        """Run with K more values, all zero, whose memory starts as the identity: it becomes A_t."""
        del previous
        (_, _, heads, key_dim), value_dim, dtype = q.shape, v.shape[-1], state_dtype(q)
        initial = layout.initial_state
        if initial is None:
            initial = jnp.zeros((heads, key_dim, value_dim), dtype)
        assert isinstance(initial, jax.Array)
        identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), (*initial.shape[:-1], key_dim))
        wide = dataclasses.replace(
            layout, initial_state=jnp.concatenate([initial.astype(dtype), identity], axis=-1)
        )
        values = jnp.concatenate([v, jnp.zeros((*v.shape[:3], key_dim), v.dtype)], axis=-1)
        found = self.run(q, k, values, coefficients, wide)
        assert isinstance(found.segment_states, jax.Array)
        assert isinstance(found.final.weights, jax.Array)
        # A document that starts here starts from the identity again, and is none of the start's.
        queries = jnp.where(goes_on[..., None, None], found.reads[..., value_dim:], 0)
        ends = goes_on[:, layout.segment_length - 1 :: layout.segment_length, None, None, None]
        response = Response(queries, jnp.where(ends, found.segment_states[..., value_dim:], 0))
        final = dataclasses.replace(found.final, weights=found.final.weights[..., :value_dim])
        return MemoryRun(found.reads[..., :value_dim], found.segment_states[..., :value_dim], final), response


def _written_before(
    run: MemoryRun, q: jax.Array, left: jax.Array, previous: Token, segment_length: int
) -> MemoryRun:
    """Add k^T v of the previous token, of which `left` [B, T, H] is in the memory at each token."""
    assert isinstance(run.segment_states, jax.Array)
    k, v = (x.astype(q.dtype) for x in previous)
    scores = left * jnp.einsum("bthk,bhk->bth", q, k, preferred_element_type=left.dtype)
    reads = run.reads.astype(left.dtype) + scores[..., None] * v[:, None].astype(left.dtype)
    at_ends = left[:, segment_length - 1 :: segment_length]
    states = jnp.einsum("bsh,bhk,bhv->bshkv", at_ends, k.astype(left.dtype), v.astype(left.dtype))
    states = run.segment_states + states
    final = dataclasses.replace(run.final, weights=states[:, -1])
    return MemoryRun(reads.astype(run.reads.dtype), states, final)

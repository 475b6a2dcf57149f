"""Tokens of the MLP memory, padded, with what is not written masked in their coefficients.

B batch, T tokens, S segments, N chunks of a segment, C chunk, H heads.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Grid
from pallas_kernels._state import state_dtype
from pallas_kernels.deep_memory._chunk import Tokens


def lay_out(
    grid: Grid,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    coefficients: tuple[jax.Array | None, ...],
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
    hidden_bias: jax.Array | None,
    hidden_gate: jax.Array | None,
) -> Tokens:
    """Return the tokens [B, S*N*C, ...], padded, with what is not written masked in their coefficients."""
    batch, count, heads = q.shape[:3]
    dtype = state_dtype(q)

    def scalar(coefficient: jax.Array | None, neutral: float) -> jax.Array:
        if coefficient is None:
            return jnp.full((batch, grid.tokens, heads), neutral, dtype)
        return grid.pad(coefficient.astype(dtype))

    retention, momentum, step = map(scalar, coefficients, (1.0, 0.0, 1.0))
    valid = None
    if lengths is not None or grid.tokens > count:
        ends = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
        valid = (jnp.arange(grid.tokens, dtype=jnp.int32)[None] < ends[:, None])[..., None]
        retention, momentum = jnp.where(valid, retention, 1), jnp.where(valid, momentum, 1)
        step = jnp.where(valid, step, 0)
    restart = None
    if document_ids is not None:
        ids = grid.pad(document_ids)
        restart = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])[..., None]
        restart = restart if valid is None else restart & valid
    return Tokens(
        q=grid.pad(q),
        k=grid.pad(k),
        v=grid.pad(v),
        retention=retention,
        momentum=momentum,
        step=step,
        live=None if valid is None else valid.astype(dtype),
        restart=restart,
        hidden_bias=None if hidden_bias is None else grid.pad(hidden_bias),
        hidden_gate=None if hidden_gate is None else grid.pad(hidden_gate.astype(dtype)),
    )

"""The dense read in one line: what every other implementation must agree with."""

import jax
import jax.numpy as jnp


def gated_state_read(q: jax.Array, gates: jax.Array, states: jax.Array) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    dtype = jnp.float64 if jnp.float64 in (q.dtype, states.dtype) else jnp.float32
    out = jnp.einsum("bthk,bthn,bnhkv->bthv", q.astype(dtype), gates.astype(dtype), states.astype(dtype))
    return out.astype(q.dtype)

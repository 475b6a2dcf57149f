"""The dense read for whichever platform a program is compiled for."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._state import Weights
from pallas_kernels.state_read import tpu, xla


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    # A token alone (in decoding) has nothing to share a state with; and no TPU has float64.
    if q.shape[1] == 1 or q.dtype == jnp.float64:
        return xla.gated_state_read(q, gates, states, segment_length=segment_length)
    return _read(q, gates, states, segment_length)


# The choice is made on either side of the gradient, so that what is saved is the arguments, on any platform.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(q, gates, states, segment_length):
    return jax.lax.platform_dependent(
        q,
        gates,
        states,
        tpu=functools.partial(tpu.gated_state_read, segment_length=segment_length),
        default=functools.partial(xla.gated_state_read, segment_length=segment_length),
    )


def _forward(q, gates, states, segment_length):
    return _read(q, gates, states, segment_length), (q, gates, states)


def _backward(segment_length, residuals, out_bar):
    def gradients(read):
        def run(q, gates, states, out_bar):
            _, vjp = jax.vjp(functools.partial(read, segment_length=segment_length), q, gates, states)
            return vjp(out_bar)

        return run

    return jax.lax.platform_dependent(
        *residuals, out_bar, tpu=gradients(tpu.gated_state_read), default=gradients(xla.gated_state_read)
    )


_read.defvjp(_forward, _backward)

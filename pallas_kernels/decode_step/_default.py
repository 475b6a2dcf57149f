"""A token of decoding for whichever platform a program is compiled for."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState
from pallas_kernels.decode_step import tpu, xla


def decode_step(
    state: OnlineState, *arguments: jax.Array, rule: str, **more: Any
) -> tuple[jax.Array, OnlineState, jax.Array]:
    """See `pallas_kernels.decode_step.decode_step`; shapes as there."""
    assert isinstance(state.weights, jax.Array)
    # No TPU has float64.
    if state.weights.dtype == jnp.float64:
        return xla.decode_step(state, *arguments, rule=rule, **more)

    def run(implementation):
        return lambda state, arguments, more: implementation(state, *arguments, rule=rule, **more)

    return jax.lax.platform_dependent(
        state, arguments, more, tpu=run(tpu.decode_step), default=run(xla.decode_step)
    )

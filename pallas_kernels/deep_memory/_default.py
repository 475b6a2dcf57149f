"""The MLP memory for whichever platform a program is compiled for."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState
from pallas_kernels.deep_memory import tpu, xla


def deep_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    objective: str,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    segment_length: int,
    segment_init: str,
    initial_state: tuple[jax.Array, jax.Array],
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
    hidden_bias: jax.Array | None,
    hidden_gate: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], OnlineState, jax.Array | None]:
    """See `pallas_kernels.deep_memory`, which checks the arguments."""
    settings = (objective, segment_length, segment_init, chunk_length)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "retention": retention,
        "momentum": momentum,
        "step": step,
        "initial_state": initial_state,
        "document_ids": document_ids,
        "lengths": lengths,
        "hidden_bias": hidden_bias,
        "hidden_gate": hidden_gate,
    }
    # No TPU has float64.
    if q.dtype == jnp.float64:
        return _with(xla.deep_memory, settings)(arguments)
    return _run(settings, arguments)


def _with(implementation, settings):
    objective, segment_length, segment_init, chunk_length = settings

    def run(arguments):
        return implementation(
            **arguments,
            objective=objective,
            segment_length=segment_length,
            segment_init=segment_init,
            chunk_length=chunk_length,
        )

    return run


# The choice is made on either side of the gradient, so that what is saved is the arguments, on any platform.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(settings, arguments):
    return jax.lax.platform_dependent(
        arguments, tpu=_with(tpu.deep_memory, settings), default=_with(xla.deep_memory, settings)
    )


def _forward(settings, arguments):
    return _run(settings, arguments), arguments


def _backward(settings, arguments, outputs_bar):
    def gradients(implementation):
        def run(arguments, outputs_bar):
            _, vjp = jax.vjp(_with(implementation, settings), arguments)
            return vjp(outputs_bar)

        return run

    return jax.lax.platform_dependent(
        arguments, outputs_bar, tpu=gradients(tpu.deep_memory), default=gradients(xla.deep_memory)
    )


_run.defvjp(_forward, _backward)

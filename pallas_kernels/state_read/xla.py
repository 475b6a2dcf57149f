"""The dense read as one matrix product a state, so that nothing of size tokens x states x dim is built.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N states.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gated_state_read(q: jax.Array, gates: jax.Array, states: jax.Array) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    return _forward(q, gates, states)[0]


def _forward(q, gates, states):
    q_BHTK = q.swapaxes(1, 2)
    accumulated = _accumulator_dtype(q, states)

    def read(out, state):
        gates_BHT, state_BHKV = state
        read_BHTV = jnp.matmul(q_BHTK, state_BHKV.astype(q.dtype), preferred_element_type=accumulated)
        return out + gates_BHT[..., None].astype(accumulated) * read_BHTV, None

    batch, length, heads, _ = q.shape
    zero = jnp.zeros((batch, heads, length, states.shape[-1]), accumulated)
    out, _ = jax.lax.scan(read, zero, _states_first(gates, states))
    return out.swapaxes(1, 2).astype(q.dtype), (q, gates, states)


def _backward(residuals, out_bar):
    # With P_n = dO M_n^T: dq = sum_n g_n P_n, dg_n = <P_n, q>, dM_n = (g_n q)^T dO; no read is made again.
    q, gates, states = residuals
    accumulated = _accumulator_dtype(q, states)
    q_BHTK, out_bar_BHTV = q.swapaxes(1, 2), out_bar.swapaxes(1, 2)

    def read_bar(q_bar, state):
        gates_BHT, state_BHKV = state
        gate = gates_BHT[..., None].astype(accumulated)
        p_BHTK = jnp.matmul(
            out_bar_BHTV, state_BHKV.astype(q.dtype).swapaxes(2, 3), preferred_element_type=accumulated
        )
        gate_bar = jnp.sum(p_BHTK * q_BHTK.astype(accumulated), axis=-1)
        gated_q = (gate * q_BHTK.astype(accumulated)).astype(q.dtype)
        state_bar = jnp.matmul(gated_q.swapaxes(2, 3), out_bar_BHTV, preferred_element_type=accumulated)
        return q_bar + gate * p_BHTK, (gate_bar.astype(gates.dtype), state_bar.astype(states.dtype))

    q_bar, (gates_bar, states_bar) = jax.lax.scan(
        read_bar, jnp.zeros(q_BHTK.shape, accumulated), _states_first(gates, states)
    )
    return (
        q_bar.swapaxes(1, 2).astype(q.dtype),
        gates_bar.transpose(1, 3, 2, 0),
        states_bar.swapaxes(0, 1),
    )


gated_state_read.defvjp(_forward, _backward)


def _accumulator_dtype(q, states):
    return jnp.float64 if jnp.float64 in (q.dtype, states.dtype) else jnp.float32


def _states_first(gates, states):
    return gates.transpose(3, 0, 2, 1), states.swapaxes(0, 1)

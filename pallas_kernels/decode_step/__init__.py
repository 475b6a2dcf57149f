"""One token of decoding with a cache: write, read the online and the selected memories, append."""

import jax
import jax.numpy as jnp

from pallas_kernels._platform import on_tpu
from pallas_kernels._state import OnlineState
from pallas_kernels.decode_step import reference, tpu, xla

__all__ = ["decode_step"]

_IMPLEMENTATIONS = {
    "reference": reference.decode_step,
    "tpu": tpu.decode_step,
    "xla": xla.decode_step,
}


def decode_step(
    state: OnlineState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    states: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    *,
    online_gate: jax.Array,
    slot: jax.Array,
    rule: str,
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    chunk_start: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, OnlineState, jax.Array]:
    """One token a row: M_t, the read g M_t(q) + sum_j g_j M_{indices[j]}(q) of MC eq. 17, and M_t appended.

    Cached states are read as they are before the token: a slot may be read, and then taken by M_t. Of the
    cache only the selected states are read, and only slots are written: donate `state` and `states`, and
    nothing is copied.

    Args:
      state: the online state before the token, as from `chunk_memory` or `initial_online_state`.
      q: query [batch, heads, key_dim].
      k: key [batch, heads, key_dim].
      v: value [batch, heads, value_dim].
      states: cached matrices [batch, slots, heads, key_dim, value_dim], float32 or bfloat16 (or float64).
      gates: weights of the selected states [batch, heads, k]; 0 where there is nothing to read.
      indices: which they are [batch, heads, k], int32, all in [0, slots) whatever their gates.
      online_gate: weight of the online memory [batch, heads].
      slot: where the state after the token is put [batch], int32, in [0, slots); -1: nowhere.
      rule: "linear", "swla", "delta" or "titans", as in `memory_step`.
      retention: [batch, heads] in [0, 1]; None is 1.
      momentum: [batch, heads]; None is 0. Only titans.
      step: [batch, heads]; None is 1.
      previous_step: [batch, heads]; None is 0. Only swla.
      chunk_start: [batch] bool, rows whose token begins a chunk. Only titans, which needs it.
      implementation: "tpu", "xla" or "reference"; None picks the best for the platform of the mesh that is
        set (`jax.set_mesh`), or else of the default device. "tpu" is float32 and bfloat16, and not split
        over devices by itself: it belongs in a `jax.shard_map` over batch and heads. It has no gradient.

    Returns:
      The read [batch, heads, value_dim] in q's dtype, the online state after the token, and the cache.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
    """
    batch, heads, key_dim = q.shape
    matrix = (batch, heads, key_dim, v.shape[-1])
    if isinstance(state.weights, tuple) or state.weights.shape != matrix:
        raise ValueError(f"the online state does not fit q {q.shape} and v {v.shape}; give a matrix {matrix}")
    if states.ndim != 5 or states.shape[1] == 0 or (states.shape[0], *states.shape[2:]) != matrix:
        raise ValueError(
            f"states {states.shape} do not fit q {q.shape} and v {v.shape}; "
            "give [batch, slots, heads, key_dim, value_dim] with 1 slot or more"
        )
    if gates.shape != indices.shape or gates.ndim != 3 or gates.shape[:2] != (batch, heads):
        raise ValueError(
            f"gates {gates.shape} and indices {indices.shape} do not fit q {q.shape}; "
            "give both as [batch, heads, k]"
        )
    if slot.shape != (batch,) or online_gate.shape != (batch, heads):
        raise ValueError(
            f"slot {slot.shape} and online_gate {online_gate.shape} do not fit q {q.shape}; "
            "give [batch] and [batch, heads]"
        )
    for name, numbers in (("indices", indices), ("slot", slot)):
        if not jnp.issubdtype(numbers.dtype, jnp.integer):
            raise ValueError(f"{name} are {numbers.dtype}; give integers")
    if rule == "titans" and chunk_start is None:
        raise ValueError("titans takes its gradients at the start of a chunk; give chunk_start")
    implementation = implementation or ("tpu" if on_tpu(state.weights) else "xla")
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; choose from {names}")
    return _IMPLEMENTATIONS[implementation](
        state,
        q,
        k,
        v,
        states,
        gates,
        indices.astype(jnp.int32),
        online_gate=online_gate,
        slot=slot.astype(jnp.int32),
        rule=rule,
        retention=retention,
        momentum=momentum,
        step=step,
        previous_step=previous_step,
        chunk_start=chunk_start,
    )

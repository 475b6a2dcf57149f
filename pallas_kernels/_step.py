"""One token of a matrix memory: what decoding runs, and what the reference scans.

B batch, H heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState, select_rows, state_dtype


def memory_step(
    state: OnlineState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    chunk_start: jax.Array | None = None,
) -> tuple[jax.Array, OnlineState]:
    """Write one token and read the memory after it; token by token this equals `chunk_memory`.

    The rules are MC eq. 12 (linear), MC eq. 28 (swla), Gated DeltaNet (delta) and Titans eq. 13-14 (titans).

    Args:
      state: the state before the token, as from `chunk_memory` or `initial_online_state`.
      q: query [B, H, K].
      k: key [B, H, K].
      v: value [B, H, V].
      rule: "linear", "swla", "delta" or "titans".
      retention: [B, H] in [0, 1]; None is 1.
      momentum: [B, H]; None is 0. Only titans.
      step: [B, H]; None is 1.
      previous_step: [B, H]; None is 0. Only swla.
      chunk_start: [B] bool, rows whose token begins a chunk; titans takes its gradients there.

    Returns:
      The online read [B, H, V] in q's dtype, and the state after the token.
    """
    dtype = state_dtype(q)

    def scalar(coefficient: jax.Array | None, default: float) -> jax.Array:
        if coefficient is None:
            return jnp.full((1, 1, 1), default, dtype)
        return coefficient.astype(dtype)[..., None]

    query, key, value = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    weights, previous, anchor, surprise = state.weights, state.previous, state.anchor, state.momentum
    assert isinstance(weights, jax.Array)
    kept = scalar(retention, 1.0)[..., None] * weights
    if rule == "titans":
        assert chunk_start is not None
        assert isinstance(surprise, jax.Array)
        assert isinstance(anchor, jax.Array)
        anchor = select_rows(chunk_start, weights, anchor)
        written = scalar(step, 1.0) * (value - _read(key, anchor))
        surprise = scalar(momentum, 0.0)[..., None] * surprise + _outer(key, written)
        weights = kept + surprise
    elif rule == "delta":
        weights = kept + _outer(key, scalar(step, 1.0) * (value - _read(key, kept)))
    else:
        weights = kept + _outer(key, scalar(step, 1.0) * value)
        if rule == "swla":
            assert previous is not None
            weights = weights + _outer(previous[0], scalar(previous_step, 0.0) * previous[1])
            previous = (key, value)
    after = OnlineState(weights=weights, momentum=surprise, anchor=anchor, previous=previous)
    return _read(query, weights).astype(q.dtype), after


def _read(query: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("bhk,bhkv->bhv", query, weights, precision="highest")


def _outer(key: jax.Array, value: jax.Array) -> jax.Array:
    return key[..., :, None] * value[..., None, :]

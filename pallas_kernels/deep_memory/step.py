"""One token of the MLP memory: what decoding runs.

B batch, H heads, K key dim, V value dim, E hidden dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import OnlineState, select_rows, state_dtype
from pallas_kernels.deep_memory._chunk import gelu_and_slope


def deep_memory_step(
    state: OnlineState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    objective: str,
    branch: str = "bounded",
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    chunk_start: jax.Array,
    hidden_bias: jax.Array | None = None,
    hidden_gate: jax.Array | None = None,
) -> tuple[jax.Array, OnlineState] | tuple[jax.Array, OnlineState, jax.Array]:
    """Write one token and read the memory after it; token by token this equals `deep_memory`.

    Args:
      state: the state before the token, as from `deep_memory` or `initial_online_state`.
      q: query [B, H, K].
      k: key [B, H, K].
      v: value [B, H, V].
      objective: "dot" or "l2", see `deep_memory`.
      branch: "bounded" or "plain", see `deep_memory`.
      retention: [B, H] in [0, 1]; None is 1.
      momentum: [B, H] in [0, 1); None is 0. Only "l2".
      step: [B, H]; None is 1.
      previous_step: always None; here because every memory is called alike.
      chunk_start: [B] bool, rows whose token begins a chunk: gradients are taken at the weights there.
      hidden_bias: [B, H, E] of weights mixed in, see `deep_memory`; None is 0.
      hidden_gate: [B, H] of the memory itself in the mixture; None is 1.

    Returns:
      The branch [B, H, V] in q's dtype, and the state after the token. With hidden_bias or hidden_gate the
      first is this memory's part of z, see `deep_memory`, and there are the hidden units [B, H, E].

    Raises:
      ValueError: for momentum with objective "dot", a previous_step, or a branch that is not known.
    """
    check_objective(objective, momentum, previous_step)
    form = Branch(branch)
    dtype = state_dtype(q)

    def scalar(coefficient: jax.Array | None, neutral: float) -> jax.Array:
        if coefficient is None:
            return jnp.full((1, 1, 1), neutral, dtype)
        return coefficient.astype(dtype)[..., None]

    query, key, value = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    assert state.anchor is not None
    anchor = select_rows(chunk_start, state.weights, state.anchor)
    key_gelu, slope = gelu_and_slope(_product(key, anchor[0]))
    output = _product(key_gelu, anchor[1])
    error = value - key - form.of(output) if objective == "l2" else value
    signal = scalar(step, 1.0) * form.bar(output, error)
    hidden_signal = jnp.einsum("bhv,bhev->bhe", signal, anchor[1], precision="highest") * slope
    writes = (_outer(key, hidden_signal), _outer(key_gelu, signal))

    surprise = None
    if objective == "l2":
        assert state.momentum is not None
        kept = scalar(momentum, 0.0)[..., None]
        surprise = writes = jax.tree.map(lambda s, write: kept * s + write, state.momentum, writes)
    kept = scalar(retention, 1.0)[..., None]
    weights = jax.tree.map(lambda w, write: kept * w + write, state.weights, writes)

    gate, hidden = scalar(hidden_gate, 1.0), _product(query, weights[0])
    if hidden_gate is not None:
        hidden = gate * hidden
    if hidden_bias is not None:
        hidden = hidden + hidden_bias.astype(dtype)
    hidden = jax.nn.gelu(hidden, approximate=True)
    read = gate * _product(hidden, weights[1])
    after = OnlineState(weights=weights, momentum=surprise, anchor=anchor)
    if hidden_bias is None and hidden_gate is None:
        return form.of(read).astype(q.dtype), after
    return read.astype(q.dtype), after, hidden.astype(q.dtype)


def check_objective(objective: str, momentum: jax.Array | None, previous_step: jax.Array | None) -> None:
    """Raise a ValueError for an objective that is not known, or a coefficient that it has no use for."""
    if objective not in ("dot", "l2"):
        raise ValueError(f"objective is {objective!r}; choose one of dot, l2")
    if momentum is not None and objective == "dot":
        raise ValueError("momentum means nothing to objective 'dot'; leave it out, or choose objective 'l2'")
    if previous_step is not None:
        raise ValueError("previous_step means nothing to an MLP memory; leave it out, or use chunk_memory")


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("bhk,bhke->bhe", x, weights, precision="highest")


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    return x[..., :, None] * y[..., None, :]

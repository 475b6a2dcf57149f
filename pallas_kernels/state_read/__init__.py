"""Reading cached states densely: every query reads every state, weighted by its gate."""

import jax

from pallas_kernels.state_read import reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.gated_state_read,
    "xla": xla.gated_state_read,
}


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """sum_n gates[..., n] (q M_n): the read of MC eq. 8 (and 6, 14, 16) over cached matrices.

    Args:
      q: queries [batch, length, heads, key_dim].
      gates: weights [batch, length, heads, states], float32; 0 where a state must not be read.
      states: cached matrices [batch, states, heads, key_dim, value_dim].
      implementation: "xla" or "reference"; None picks the best.

    Returns:
      [batch, length, heads, value_dim] of q's dtype.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    batch, length, heads, key_dim = q.shape
    if gates.shape[:3] != (batch, length, heads):
        raise ValueError(f"gates {gates.shape} do not fit q {q.shape}; give [batch, length, heads, states]")
    if states.shape[:4] != (batch, gates.shape[3], heads, key_dim):
        raise ValueError(
            f"states {states.shape} do not fit q {q.shape} and gates {gates.shape}; "
            "give [batch, states, heads, key_dim, value_dim]"
        )
    name = implementation or "xla"
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; choose from {', '.join(_IMPLEMENTATIONS)}")
    return _IMPLEMENTATIONS[name](q, gates, states)

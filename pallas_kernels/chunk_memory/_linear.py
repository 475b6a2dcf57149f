"""One segment of linear and of swla, all its chunks at once (MC eq. 12 and 28).

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState
from pallas_kernels.chunk_memory._chunks import Tokens, scaled
from pallas_kernels.chunk_memory._decay import decay_matrix


def linear_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V].

    Per chunk, with D_ij the retention from token j to i: O = (Q K^T o D) U + A Q M_0 and
    M_C = A_C M_0 + (D_C K)^T U, where U = step V; swla adds D_{i,j+1} previous_step_{j+1} to the mask.

    Args:
      state: the state before, weights [R, H, K, V].
      tokens: the segment.
      initial: [R, H, K, V], what documents start from.
    """
    weights, dtype = state.weights, tokens.q.dtype
    assert isinstance(weights, jax.Array)
    mask = _mask(tokens, weights.dtype)
    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, tokens.k, preferred_element_type=weights.dtype)

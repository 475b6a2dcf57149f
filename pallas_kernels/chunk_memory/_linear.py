"""One segment of linear and of swla, all its chunks at once (MC eq. 12 and 28).

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Tokens, product, scaled
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState


def linear_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V].

    Per chunk, with W_ij the weight of token j's value in the state after token i and A the retention since
    the chunk's start: O = (Q K^T o W) V + A Q M_0 and M_C = A_C M_0 + (W_C K)^T V. For linear W = D, the
    products of retentions; swla adds a second term and, in front, the token before the chunk.

    Args:
      state: the state before; weights [R, H, K, V].
      tokens: the segment.
      initial: what documents start from [R, H, K, V].
    """
    weights = state.weights
    assert isinstance(weights, jax.Array)
    k, v, decay = tokens.k, tokens.v, tokens.decay
    if decay is None:
        chunk = k.shape[-2]
        products = jnp.tri(chunk, dtype=weights.dtype)[None, None, None]
    else:
        products = decay_matrix(decay)
    if state.previous is None:
        share, values = products, scaled(v, tokens.write)
    else:
        share, values = _with_previous(products, tokens), _prepend(state.previous[1], v)
        k = _prepend(state.previous[0], k)

    enter = None if decay is None else products[..., 0] * decay[..., :1]
    writes = jnp.einsum(
        "rnhck,rnhcv->rnhkv",
        scaled(k, share[..., -1, :]),
        values.astype(weights.dtype),
    )
    renew = None
    if tokens.restart is not None:
        renew = jnp.einsum("rnhcd,rnhd->rnhc", products, tokens.restart, precision="highest")
        writes = writes + renew[..., -1, None, None] * initial[:, None]
    weights, starts = _carry(weights, writes, None if enter is None else enter[..., -1])

    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, k, preferred_element_type=weights.dtype)
    reads = product("rnhcd,rnhdv->rnhcv", scores * share, values, tokens.q)
    reads = reads + product("rnhck,rnhkv->rnhcv", scaled(tokens.q, enter), starts, tokens.q)
    if renew is not None:
        reads = reads + product("rnhck,rhkv->rnhcv", scaled(tokens.q, renew), initial, tokens.q)

    previous = None if state.previous is None else (tokens.k[:, -1, :, -1], tokens.v[:, -1, :, -1])
    if previous is not None:
        previous = jax.tree.map(lambda x: x.astype(weights.dtype), previous)
    return OnlineState(weights=weights, previous=previous), reads


def _carry(weights: jax.Array, writes: jax.Array, decay: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the state after the last chunk, and those before each [R, N, H, K, V]: M <- decay M + writes."""

    def chunk_step(weights: jax.Array, inputs):
        write, decay = inputs
        kept = weights if decay is None else decay[..., None, None] * weights
        return kept + write, weights

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (writes, decay))
    weights, starts = jax.lax.scan(chunk_step, weights, inputs, unroll=4)
    return weights, jnp.moveaxis(starts, 0, 1)


def _with_previous(products: jax.Array, tokens: Tokens) -> jax.Array:
    """Return swla's weights [R, N, H, C, 1 + C] of the token before the chunk and of the chunk's tokens."""
    own = products if tokens.write is None else products * tokens.write[..., None, :]
    own = jnp.pad(own, [(0, 0)] * 4 + [(1, 0)])
    if tokens.previous_write is None:
        return own
    before = products * tokens.previous_write[..., None, :]
    return own + jnp.pad(before, [(0, 0)] * 4 + [(0, 1)])


def _prepend(previous: jax.Array, x: jax.Array) -> jax.Array:
    """Return [R, N, H, 1 + C, dim]: each chunk with the token before it, `previous` [R, H, dim] at first."""
    before = jnp.concatenate([previous[:, None].astype(x.dtype), x[:, :-1, :, -1]], axis=1)
    return jnp.concatenate([before[:, :, :, None], x], axis=3)

"""One segment of linear and of swla, all its chunks at once (MC eq. 12 and 28).

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Tokens, product, scaled
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState

type Carry = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""From the state before, what every chunk writes and keeps, to the state after every chunk."""


def linear_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V]: `linear_chunks` in a loop."""
    state, reads, _ = linear_chunks(state, tokens, initial, carry_in_turn)
    return state, reads


def linear_chunks(
    state: OnlineState, tokens: Tokens, initial: jax.Array, carry: Carry
) -> tuple[OnlineState, jax.Array, jax.Array]:
    """Return the state after N chunks, their reads [R, N, H, C, V], the weights after each [R, N, H, K, V].

    Per chunk, with W_ij the weight of token j's value in the state after token i and A the retention since
    the chunk's start: O = (Q K^T o W) V + A Q M_0 and M_C = A_C M_0 + (W_C K)^T V. For linear W = D, the
    products of retentions; swla adds a second term and, in front, the token before the chunk.

    Args:
      state: the state before; weights [R, H, K, V].
      tokens: the segment.
      initial: what documents start from [R, H, K, V].
      carry: how the state goes from chunk to chunk.
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
    ends = carry(weights, writes, None if enter is None else enter[..., -1])
    starts = jnp.concatenate([weights[:, None], ends[:, :-1]], axis=1)

    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, k, preferred_element_type=weights.dtype)
    reads = product("rnhcd,rnhdv->rnhcv", scores * share, values, tokens.q)
    reads = reads + product("rnhck,rnhkv->rnhcv", scaled(tokens.q, enter), starts, tokens.q)
    if renew is not None:
        reads = reads + product("rnhck,rhkv->rnhcv", scaled(tokens.q, renew), initial, tokens.q)

    previous = None if state.previous is None else (tokens.k[:, -1, :, -1], tokens.v[:, -1, :, -1])
    if previous is not None:
        previous = jax.tree.map(lambda x: x.astype(weights.dtype), previous)
    return OnlineState(weights=ends[:, -1], previous=previous), reads, ends


def carry_in_turn(weights: jax.Array, writes: jax.Array, decay: jax.Array | None) -> jax.Array:
    """Return the state after each chunk [R, N, H, K, V], M <- decay M + writes, one after another."""

    def chunk_step(weights: jax.Array, inputs):
        write, decay = inputs
        kept = weights if decay is None else decay[..., None, None] * weights
        after = kept + write
        return after, after

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (writes, decay))
    _, ends = jax.lax.scan(chunk_step, weights, inputs, unroll=4)
    return jnp.moveaxis(ends, 0, 1)


def carry_at_once(weights: jax.Array, writes: jax.Array, decay: jax.Array | None) -> jax.Array:
    """Return what `carry_in_turn` does, as one product with the chunks' products of retentions [N, N].

    A chunk's share of that product is N K V multiplications, where a loop would be N kernels in a row.
    """
    rows, chunks, heads = writes.shape[:3]
    if decay is None:
        shares = jnp.tri(chunks, dtype=writes.dtype)[None, None]
        entered = jnp.ones((1, chunks, 1), writes.dtype)
    else:
        decay_RHN = decay.swapaxes(1, 2)
        shares = decay_matrix(decay_RHN)
        entered = (shares[..., 0] * decay_RHN[..., :1]).swapaxes(1, 2)
    flat_RHNW = writes.swapaxes(1, 2).reshape(rows, heads, chunks, -1)
    ends = jnp.matmul(shares, flat_RHNW, precision="highest")
    ends = ends.reshape(rows, heads, chunks, *writes.shape[3:])
    return ends.swapaxes(1, 2) + entered[..., None, None] * weights[:, None]


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

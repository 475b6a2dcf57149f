"""One segment of titans with a matrix memory: a loop over its chunks, the reads after it.

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Tokens, product, scaled
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState, select_rows


def titans_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V].

    Gradients are taken at a chunk's start, U = h (V - K M_0). With B the products of retentions, E those of
    momenta, G = B E, and b, f the shares of M_0 and S_0 in M_t: O = b Q M_0 + f Q S_0 + (Q K^T o G) U,
    M_C = b_C M_0 + f_C S_0 + (G_C K)^T U, S_C = m_C S_0 + (E_C K)^T U (Titans eq. 13-14).

    Args:
      state: the state before; weights, momentum and anchor [R, H, K, V].
      tokens: the segment; documents start at chunks' starts.
      initial: what documents start from [R, H, K, V].
    """
    assert isinstance(state.weights, jax.Array)
    dtype = state.weights.dtype
    k, v = tokens.k.astype(dtype), tokens.v.astype(dtype)
    rows, chunks, heads, chunk, key_dim = k.shape

    def fill(coefficient: jax.Array | None, neutral: float) -> jax.Array:
        if coefficient is None:
            return jnp.full((rows, chunks, heads, chunk), neutral, dtype)
        return jnp.broadcast_to(coefficient, (rows, chunks, heads, chunk))

    decay, momentum, live = fill(tokens.decay, 1), fill(tokens.momentum, 0), fill(tokens.live, 1)
    kept, pushed = decay_matrix(decay), decay_matrix(momentum)
    kept_since, pushed_since = kept[..., 0] * decay[..., :1], pushed[..., 0] * momentum[..., :1]
    # Where nothing is written the momentum stays, and does not move the weights.
    moved = kept * live[..., None, :]
    share = jnp.einsum("rnhcj,rnhjd->rnhcd", moved, pushed, precision="highest")
    moved_since = jnp.einsum("rnhcj,rnhj->rnhc", moved, pushed_since, precision="highest")

    def chunk_step(carry: OnlineState, inputs):
        k, v, write, writes, last, live, document_start = inputs
        if document_start is not None:
            carry = select_rows(document_start, restart, carry)
        weights, surprise = carry.weights, carry.momentum
        assert isinstance(weights, jax.Array)
        assert isinstance(surprise, jax.Array)
        error = scaled(v - jnp.einsum("rhck,rhkv->rhcv", k, weights, precision="highest"), write)
        change = jnp.einsum("rhck,rhcv->rhkv", writes, error, precision="highest")
        kept, moved, pushed = (x[..., None, None] for x in last)
        after = OnlineState(
            weights=kept * weights + moved * surprise + change[..., :key_dim, :],
            momentum=pushed * surprise + change[..., key_dim:, :],
            anchor=weights if live is None else select_rows(live, weights, carry.anchor),
        )
        return after, (jnp.concatenate([weights, surprise], axis=-2), error)

    restart = OnlineState(weights=initial, momentum=jnp.zeros_like(initial), anchor=initial)
    last = (kept_since[..., -1], moved_since[..., -1], pushed_since[..., -1])
    writes = jnp.concatenate([scaled(k, share[..., -1, :]), scaled(k, pushed[..., -1, :])], axis=-1)
    chunk_live = None if tokens.live is None else live[:, :, 0, 0] > 0
    chunk_start = None if tokens.document_start is None else tokens.document_start[:, :, 0, 0]
    inputs = (k, v, fill(tokens.write, 1), writes, last, chunk_live, chunk_start)
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, emitted = jax.lax.scan(chunk_step, state, inputs)
    starts, errors = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), emitted)

    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, tokens.k, preferred_element_type=dtype)
    reads = product("rnhcd,rnhdv->rnhcv", scores * share, errors, tokens.q)
    queries = jnp.concatenate([scaled(tokens.q, kept_since), scaled(tokens.q, moved_since)], axis=-1)
    return state, reads + product("rnhck,rnhkv->rnhcv", queries, starts, tokens.q)

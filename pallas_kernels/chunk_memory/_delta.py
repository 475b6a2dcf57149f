"""One segment of the gated delta rule: a triangular system a chunk, then a loop over its chunks.

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Tokens, product, scaled
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState
from pallas_kernels.chunk_memory._triangular import solve_unit_lower


def delta_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V].

    Token t writes k_t^T u_t, where u_t = h_t (v_t - k_t a_t M_{t-1}) needs the chunk's earlier u. With D
    the products of retentions and A those since the chunk's start,
    (I + strict_tril(h K K^T o D)) U = h (V - A K M_0); then, as for linear, O = (Q K^T o D) U + A Q M_0
    and M_C = A_C M_0 + (D_C K)^T U (Gated DeltaNet, arXiv:2412.06464).

    Args:
      state: the state before; weights [R, H, K, V].
      tokens: the segment.
      initial: what documents start from [R, H, K, V].
    """
    assert isinstance(state.weights, jax.Array)
    dtype = state.weights.dtype
    k, v = tokens.k.astype(dtype), tokens.v.astype(dtype)
    chunk, key_dim = k.shape[-2:]
    if tokens.decay is None:
        products, enter = jnp.tri(chunk, dtype=dtype)[None, None, None], None
    else:
        products = decay_matrix(tokens.decay)
        enter = products[..., 0] * tokens.decay[..., :1]
    carried = renew = None
    if tokens.restart is not None:
        renew = jnp.einsum("rnhcd,rnhd->rnhc", products, tokens.restart, precision="highest")
        v = v - jnp.einsum("rnhck,rhkv->rnhcv", scaled(k, renew), initial, precision="highest")
        carried = renew[..., -1, None, None] * initial[:, None]

    system = products * jnp.einsum("rnhck,rnhdk->rnhcd", k, k, precision="highest")
    sides = jnp.concatenate([scaled(k, enter), v], axis=-1)
    solved = solve_unit_lower(scaled(system, tokens.write), scaled(sides, tokens.write))
    through = None if enter is None else enter[..., -1]
    inputs = (solved[..., :key_dim], solved[..., key_dim:], scaled(k, products[..., -1, :]), through, carried)

    def chunk_step(weights: jax.Array, inputs):
        removed, added, into, through, carried = inputs
        written = added - jnp.einsum("rhck,rhkv->rhcv", removed, weights, precision="highest")
        after = weights if through is None else through[..., None, None] * weights
        after = after + jnp.einsum("rhck,rhcv->rhkv", into, written, precision="highest")
        return after if carried is None else after + carried, (weights, written)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    weights, emitted = jax.lax.scan(chunk_step, state.weights, inputs)
    starts, written = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), emitted)

    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, tokens.k, preferred_element_type=dtype)
    reads = product("rnhcd,rnhdv->rnhcv", scores * products, written, tokens.q)
    reads = reads + product("rnhck,rnhkv->rnhcv", scaled(tokens.q, enter), starts, tokens.q)
    if renew is not None:
        reads = reads + product("rnhck,rhkv->rnhcv", scaled(tokens.q, renew), initial, tokens.q)
    return OnlineState(weights=weights), reads

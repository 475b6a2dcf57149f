"""One segment of the gated delta rule: a triangular system a chunk, then the states from chunk to chunk.

R rows, N chunks, H heads, C chunk, K key dim, V value dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Tokens, product, scaled
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState
from pallas_kernels.chunk_memory._triangular import solve_unit_lower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Writes:
    """What chunks do to a state: M <- through M + into^T (added - removed M) + carried; None is 1 and 0."""

    removed: jax.Array
    """[R, N, H, C, K]."""
    added: jax.Array
    """[R, N, H, C, V]."""
    into: jax.Array
    """[R, N, H, C, K]."""
    through: jax.Array | None
    """[R, N, H or 1]."""
    carried: jax.Array | None
    """[R, N, H, K, V]."""


type Carry = Callable[[jax.Array, Writes], tuple[jax.Array, jax.Array]]
"""From the state before and the writes to the state after every chunk and the values written in it."""


def delta_segment(state: OnlineState, tokens: Tokens, initial: jax.Array) -> tuple[OnlineState, jax.Array]:
    """Return the state after a segment and its reads [R, N, H, C, V]: `delta_chunks` in a loop."""
    state, reads, _ = delta_chunks(state, tokens, initial, carry_in_turn)
    return state, reads


def delta_chunks(
    state: OnlineState, tokens: Tokens, initial: jax.Array, carry: Carry
) -> tuple[OnlineState, jax.Array, jax.Array]:
    """Return the state after N chunks, their reads [R, N, H, C, V], the weights after each [R, N, H, K, V].

    Token t writes k_t^T u_t, where u_t = h_t (v_t - k_t a_t M_{t-1}) needs the chunk's earlier u. With D
    the products of retentions and A those since the chunk's start,
    (I + strict_tril(h K K^T o D)) U = h (V - A K M_0); then, as for linear, O = (Q K^T o D) U + A Q M_0
    and M_C = A_C M_0 + (D_C K)^T U (Gated DeltaNet, arXiv:2412.06464).

    Args:
      state: the state before; weights [R, H, K, V].
      tokens: the segment.
      initial: what documents start from [R, H, K, V].
      carry: how the state goes from chunk to chunk.
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
    writes = Writes(
        removed=solved[..., :key_dim],
        added=solved[..., key_dim:],
        into=scaled(k, products[..., -1, :]),
        through=None if enter is None else enter[..., -1],
        carried=carried,
    )
    ends, written = carry(state.weights, writes)
    starts = jnp.concatenate([state.weights[:, None], ends[:, :-1]], axis=1)

    scores = jnp.einsum("rnhck,rnhdk->rnhcd", tokens.q, tokens.k, preferred_element_type=dtype)
    reads = product("rnhcd,rnhdv->rnhcv", scores * products, written, tokens.q)
    reads = reads + product("rnhck,rnhkv->rnhcv", scaled(tokens.q, enter), starts, tokens.q)
    if renew is not None:
        reads = reads + product("rnhck,rhkv->rnhcv", scaled(tokens.q, renew), initial, tokens.q)
    return OnlineState(weights=ends[:, -1]), reads, ends


def carry_in_turn(weights: jax.Array, writes: Writes) -> tuple[jax.Array, jax.Array]:
    """Return the state after each chunk [R, N, H, K, V] and what it wrote [R, N, H, C, V], in a loop."""

    def chunk_step(weights: jax.Array, chunk: Writes):
        written = chunk.added - jnp.einsum("rhck,rhkv->rhcv", chunk.removed, weights, precision="highest")
        after = weights if chunk.through is None else chunk.through[..., None, None] * weights
        after = after + jnp.einsum("rhck,rhcv->rhkv", chunk.into, written, precision="highest")
        after = after if chunk.carried is None else after + chunk.carried
        return after, (after, written)

    _, emitted = jax.lax.scan(chunk_step, weights, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), writes))
    ends, written = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), emitted)
    return ends, written


def carry_at_once(weights: jax.Array, writes: Writes) -> tuple[jax.Array, jax.Array]:
    """Return what `carry_in_turn` does, by an associative scan of the chunks' maps M <- P M + L.

    P is a matrix [K, K], so that this is some four times the multiplications of the loop.
    """
    kept = jnp.eye(weights.shape[-2], dtype=weights.dtype)[None, None, None]
    kept = kept if writes.through is None else writes.through[..., None, None] * kept
    kept = kept - jnp.einsum("rnhck,rnhcl->rnhkl", writes.into, writes.removed, precision="highest")
    added = jnp.einsum("rnhck,rnhcv->rnhkv", writes.into, writes.added, precision="highest")
    added = added if writes.carried is None else added + writes.carried
    added = added.at[:, 0].add(_product(kept[:, 0], weights))

    def after(first, second):
        (kept, added), (kept_next, added_next) = first, second
        return _product(kept_next, kept), _product(kept_next, added) + added_next

    _, ends = jax.lax.associative_scan(after, (kept, added), axis=1)
    starts = jnp.concatenate([weights[:, None], ends[:, :-1]], axis=1)
    return ends, writes.added - _product(writes.removed, starts)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")

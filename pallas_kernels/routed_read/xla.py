"""The sparse read by matrix products over the tokens that share a state.

Backwards all but the arguments is made again, and gradients go through the same grouping.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, E hidden dim, N states, k states a token reads,
G = B H, R rows: see `_grouping`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._platform import platform
from pallas_kernels._query import gelu, matmul, query
from pallas_kernels._state import Weights, state_dtype
from pallas_kernels.routed_read._grouping import Grouping, from_rows, group, group_in_blocks, to_rows

# Rows that share a copy of a state: fewer mean smaller products, more mean more empty rows. On a CPU the best
# of 16, 32, 64, 128, for keys of 32 as for keys of 128.
_BLOCK = 64
# Bytes of the copies that a GPU makes at once: enough heads side by side to keep it busy. Not measured.
_GPU_COPIES = 512 << 20


def _made_again(read):
    """Keep nothing but the arguments of a read for its gradient."""

    @functools.wraps(read)
    def run(*arrays, branch):
        return jax.checkpoint(functools.partial(read, branch=branch))(*arrays)

    return run


type Product = Callable[[jax.Array, jax.Array], jax.Array]
"""Rows [R, K] times the states [..., K, V] that they read."""


def gather(
    q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights, *, branch: Branch | None
) -> jax.Array:
    """Copy to every token the states that it reads: for one token a row, in decoding."""
    of_head = jax.vmap(lambda leaf, chosen: leaf[chosen], in_axes=(1, 1), out_axes=1)
    chosen_BTHk = jax.tree.map(lambda leaf: jax.vmap(of_head)(leaf, indices), states)
    reads_BTHkV = query(q[:, :, :, None, None], chosen_BTHk, branch)[..., 0, :]
    gates_BTHk1 = gates[..., None].astype(reads_BTHkV.dtype)
    return jnp.sum(jnp.where(gates_BTHk1 != 0, gates_BTHk1 * reads_BTHkV, 0), axis=3).astype(q.dtype)


@_made_again
def in_blocks(
    q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights, *, branch: Branch | None
) -> jax.Array:
    """Pad the tokens of each state to whole blocks, each a product with its own copy of the state.

    For CPUs and GPUs, where `jax.lax.ragged_dot` multiplies all rows with all states (compiled for an H100,
    the gradient at 32,768 tokens, 8 heads and 128 states of 128 x 128 would take 550 GB). Head by head on a
    CPU, so that what is copied stays small; as many heads side by side on a GPU as copies may be large.
    """

    @jax.checkpoint
    def read_head(arguments):
        q_TK, gates_Tk, indices_Tk, states = arguments
        number = jax.tree.leaves(states)[0].shape[0]
        grouping, state_of_block = group_in_blocks(indices_Tk.reshape(-1), number, _BLOCK)

        def product(rows, leaf):
            blocks = rows.reshape(-1, _BLOCK, rows.shape[-1])
            return matmul(blocks, leaf[state_of_block]).reshape(rows.shape[0], -1)

        return _read(q_TK, gates_Tk, states, branch, grouping, product)

    heads = jax.tree.map(_heads_first, (q, gates, indices, states))
    out_GTV = jax.lax.map(read_head, heads, batch_size=_heads_at_once(*heads))
    return _heads_back(out_GTV, q)


def _heads_at_once(q_GTK, gates_GTk, _, states) -> int | None:
    """Heads whose copies of states fit, a divisor of G; None: one at a time."""
    if platform() != "gpu":
        return None
    lists, pairs = q_GTK.shape[0], gates_GTk[0].size
    leaves = jax.tree.leaves(states)
    rows = pairs + _BLOCK * min(leaves[0].shape[1], pairs)
    copies = rows // _BLOCK * sum(leaf[0, 0].size for leaf in leaves) * q_GTK.dtype.itemsize
    return max(n for n in range(1, lists + 1) if lists % n == 0 and (n == 1 or n * copies <= _GPU_COPIES))


@_made_again
def by_ragged_dot(
    q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights, *, branch: Branch | None
) -> jax.Array:
    """Multiply the tokens of each state with it by `jax.lax.ragged_dot`: for TPUs."""
    q_GTK, gates_GTk, indices_GTk, states = jax.tree.map(_heads_first, (q, gates, indices, states))
    lists, _, choices = gates_GTk.shape
    grouping, count_GN = group(indices_GTk.reshape(lists, -1), jax.tree.leaves(states)[0].shape[1])

    def product(rows, leaf_GNKV):
        return jax.lax.ragged_dot(
            rows,
            leaf_GNKV.reshape(-1, *leaf_GNKV.shape[2:]).astype(rows.dtype),
            count_GN.reshape(-1),
            preferred_element_type=state_dtype(rows),
        )

    q_RK, gates_Rk = q_GTK.reshape(-1, q.shape[-1]), gates_GTk.reshape(-1, choices)
    out = _read(q_RK, gates_Rk, states, branch, grouping, product)
    return _heads_back(out.reshape(lists, -1, out.shape[-1]), q)


def _read(q, gates, states, branch: Branch | None, grouping: Grouping, product: Product):
    """Reads [T, V] by queries [T, K] and gates [T, k], or by those of all heads one after the other."""
    choices = gates.shape[1]
    hidden = to_rows(choices, q, grouping)
    gate = to_rows(1, gates.reshape(-1, 1), grouping).astype(state_dtype(q))
    gate = jnp.where(grouping.filled[:, None], gate, jnp.zeros((), gate.dtype))
    if isinstance(states, tuple):
        w_in, states = states
        hidden = gelu(product(hidden, w_in))
    if branch is not None and branch.is_bounded:
        rows = gate * branch.of(product(hidden.astype(q.dtype), states))
    else:
        # Weighed before the last product: backwards the gate's gradient then needs no read again.
        rows = product((gate * hidden.astype(gate.dtype)).astype(q.dtype), states)
    return from_rows(choices, rows, grouping).astype(q.dtype)


def _heads_first(x):
    """[B, T or N, H, ...] -> [B H, T or N, ...]."""
    x = x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _heads_back(x_GTV, q):
    batch, tokens, heads, _ = q.shape
    return x_GTV.reshape(batch, heads, tokens, -1).swapaxes(1, 2)

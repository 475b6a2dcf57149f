"""The dense read of MLP states on a TPU, and its gradients: gates weigh the hidden layer.

Backward the hidden layer is made again, and with P_n = W_out_n dO the gradients are dg_n = <P_n, h_n>,
dW_out_n = (g_n h_n) dO^T, and through dz_n = g_n P_n gelu'(z_n): dq = sum_n W_in_n dz_n, dW_in_n = q dz_n^T.
They grow in VMEM as those of `_tpu_matrix` do.

Shapes: E hidden dim, R blocks of a piece; the rest in `_tpu_tiling`. A group has one state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._branch import Branch
from pallas_kernels._platform import has_wide_units
from pallas_kernels._query import gelu
from pallas_kernels._state import state_dtype
from pallas_kernels._tpu_lanes import from_lanes, lanes, product, product_of_lanes, product_of_rows
from pallas_kernels.state_read import _tpu_tiling as tiles
from pallas_kernels.state_read._tpu_tiling import BackwardSpecs, ForwardSpecs, Tiling

# Tokens that go through a state at once, backward more where matrix units are 256 wide; and of a forward
# block, for which states are loaded anew.
_LENGTH, _LENGTH_WIDE = 256, 512
_BLOCK = 8 * _LENGTH
# States visited in one go: two of so many numbers a layer; a larger one keeps the matrix unit busy alone.
_TOGETHER, _SMALL = 2, 1 << 16


def read(
    q: jax.Array,
    gates: jax.Array,
    states: tuple[jax.Array, jax.Array],
    branch: Branch,
    segment_length: int | None,
) -> jax.Array:
    """Return sum_n gates_n branch(gelu(q W_in_n) W_out_n); shapes as in the op."""
    w_in, w_out = states
    batch, tokens, heads, _ = q.shape
    value_dim = w_out.shape[4]
    tiling = _fit(q, w_in, w_out, segment_length, _BLOCK, _loaded_bytes(q, w_in))
    w_in, w_out = tiles.pad_states(w_in, tiling), tiles.pad_states(w_out, tiling)
    (rows, hidden), columns = w_in.shape[3:], w_out.shape[4]
    specs = ForwardSpecs(tiling)
    out_BHVT = pl.pallas_call(
        functools.partial(_read_kernel, tiling, _along_rows(branch, value_dim)),
        grid=(batch, heads, tiling.blocks, tiling.tiles),
        in_specs=[
            specs.tokens(rows),
            specs.gates(),
            specs.whole_states(rows, hidden),
            specs.whole_states(hidden, columns),
        ],
        out_specs=specs.tokens(columns),
        out_shape=jax.ShapeDtypeStruct((batch, heads, columns, tiling.tokens), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((columns, tiling.length), state_dtype(q)),
            *_rounded(tiling, q, w_in, w_out),
        ],
        compiler_params=tiles.parameters("parallel", "parallel", "parallel", "arbitrary"),
        name="mlp_state_read",
    )(
        lanes(q, tiling.tokens),
        tiles.gate_groups(gates, tiling),
        w_in,
        w_out,
    )
    return from_lanes(out_BHVT, tokens, value_dim)


def _together(w_in) -> int:
    return _TOGETHER if w_in.shape[-2] * w_in.shape[-1] <= _SMALL else 1


def _loaded_bytes(q, leaf):
    """Bytes of a state's number: loaded, twice since the next is on its way, and rounded: half of it."""
    return leaf.dtype.itemsize + (0 if leaf.dtype == q.dtype else q.dtype.itemsize / 2)


def _rounded(tiling: Tiling, q: jax.Array, *states: jax.Array) -> list:
    """Return where the states of a tile lie that products can have: rounded here, XLA need not copy them."""
    return [pltpu.VMEM((tiling.tile, *leaf.shape[3:]), q.dtype) for leaf in states if leaf.dtype != q.dtype]


def _round(states, rounded, count) -> tuple:
    """Round the first `count` states of a tile, and return where they lie."""
    if not rounded:
        return states

    def turn(n, _):
        for leaf, to in zip(states, rounded, strict=True):
            to[n] = leaf[n].astype(to.dtype)

    jax.lax.fori_loop(0, count, turn, None)
    return tuple(rounded)


def _fit(q, w_in, w_out, segment_length, length, bytes_of_number, piece=None):
    numbers = w_in.shape[3] * w_in.shape[4] + w_out.shape[3] * w_out.shape[4]
    return tiles.fit(
        tokens=q.shape[1],
        states=w_in.shape[1],
        segment_length=segment_length,
        group=1,
        most=tiles.room_for_states() // (2 * numbers * bytes_of_number),
        length=length,
        piece=piece,
    )


def _along_rows(branch: Branch, value_dim: int) -> Branch:
    """Return the branch of reads [V, C], padding after their values."""
    return dataclasses.replace(branch, axis=0, dim=value_dim)


def _read_kernel(
    tiling: Tiling, branch: Branch, q_KC, gates_SGC, w_in_NKE, w_out_NEV, out_VC, sum_VC, *rounded
):
    block, tile = pl.program_id(2), pl.program_id(3)
    states = (w_in_NKE, w_out_NEV)
    w_in_NKE, w_out_NEV = _round(states, rounded, tiling.groups_read_of(block, tile))

    @pl.when(tile == 0)
    def _():
        sum_VC[...] = jnp.zeros_like(sum_VC)

    def visit(columns, first, count):
        q = q_KC[:, columns]
        for state in range(count):
            gate = gates_SGC[first + state, :, columns]
            hidden = gelu(product_of_rows(w_in_NKE[first + state], q))
            if branch.is_bounded:
                z = product_of_rows(w_out_NEV[first + state], hidden.astype(q.dtype))
                sum_VC[:, columns] += gate * branch.of(z)
            else:
                hidden = (gate * hidden).astype(q.dtype)
                sum_VC[:, columns] += product_of_rows(w_out_NEV[first + state], hidden)

    for start in range(0, tiling.length, _LENGTH):
        stop = min(start + _LENGTH, tiling.length)
        count = tiling.groups_read_of(block, tile, stop)
        tiles.for_groups(count, functools.partial(visit, slice(start, stop)), _together(w_in_NKE))

    @pl.when(tile == tiling.tiles - 1)
    def _():
        out_VC[...] = sum_VC[...].astype(out_VC.dtype)


def read_bar(
    q: jax.Array,
    gates: jax.Array,
    states: tuple[jax.Array, jax.Array],
    out_bar: jax.Array,
    branch: Branch,
    segment_length: int | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the gradients of q, gates and states, the last two in float32; shapes as in the op."""
    w_in, w_out = states
    batch, tokens, heads, key_dim = q.shape
    count, hidden_dim, value_dim = w_in.shape[1], *w_out.shape[3:]
    dtype = state_dtype(q)
    bytes_of_number = _loaded_bytes(q, w_in) + dtype.itemsize
    # A state alone may be larger than a tile should be; then less is left for queries.
    excess = 2 * (key_dim + value_dim) * hidden_dim * bytes_of_number - tiles.room_for_states()
    queries_bytes = max(tiles.room_for_queries() - max(0, round(excess)), tiles.room_for_queries() // 4)
    length = _LENGTH_WIDE if has_wide_units() else _LENGTH
    if branch.is_bounded and excess > tiles.room_for_queries():
        # On a v4: a bounded read's sums, and their gradients, are as many numbers as its tokens.
        length //= 2
    tiling = _fit(
        q,
        w_in,
        w_out,
        segment_length,
        length,
        bytes_of_number,
        piece=queries_bytes // (key_dim * dtype.itemsize),
    )
    q_BHKT = lanes(q, tiling.tokens)
    gates_BHSGT = tiles.gate_groups(gates, tiling)
    w_in, w_out = tiles.pad_states(w_in, tiling), tiles.pad_states(w_out, tiling)
    (rows, hidden), columns = w_in.shape[3:], w_out.shape[4]
    specs = BackwardSpecs(tiling)
    q_bar, gates_bar, w_in_bar, w_out_bar = pl.pallas_call(
        functools.partial(_read_bar_kernel, tiling, _along_rows(branch, value_dim)),
        grid=(batch, heads, tiling.pieces, tiling.tiles, tiling.blocks),
        in_specs=[
            specs.tokens(rows),
            specs.gates(),
            specs.states(rows, hidden),
            specs.states(hidden, columns),
            specs.tokens(columns),
        ],
        out_specs=[
            specs.tokens_bar(rows),
            specs.gates_bar(),
            specs.states_bar(rows, hidden),
            specs.states_bar(hidden, columns),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q_BHKT.shape, q.dtype),
            jax.ShapeDtypeStruct(gates_BHSGT.shape, dtype),
            jax.ShapeDtypeStruct((tiling.pieces, *w_in.shape), dtype),
            jax.ShapeDtypeStruct((tiling.pieces, *w_out.shape), dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiling.blocks, rows, tiling.length), dtype),
            *_rounded(tiling, q, w_in, w_out),
        ],
        compiler_params=tiles.parameters("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
        name="mlp_state_read_backward",
    )(
        q_BHKT,
        gates_BHSGT,
        w_in,
        w_out,
        lanes(out_bar.astype(q.dtype), tiling.tokens),
    )
    return (
        from_lanes(q_bar, tokens, key_dim),
        tiles.from_gate_groups(gates_bar, tokens, count),
        (
            jnp.sum(w_in_bar, axis=0)[:, :count, :, :key_dim, :hidden_dim],
            jnp.sum(w_out_bar, axis=0)[:, :count, :, :hidden_dim, :value_dim],
        ),
    )


def _read_bar_kernel(
    tiling: Tiling,
    branch: Branch,
    q_KC,
    gates_SGC,
    w_in_NKE,
    w_out_NEV,
    out_bar_VC,
    q_bar_KC,
    gates_bar_SGC,
    w_in_bar_NKE,
    w_out_bar_NEV,
    sum_RKC,
    *rounded,
):
    piece, tile, block = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    q, out_bar = q_KC[...], out_bar_VC[...]
    # A tile's states stay while the blocks pass.
    states = (w_in_NKE, w_out_NEV)
    w_in_NKE, w_out_NEV = _round(states, rounded, jnp.where(block == 0, tiling.tile, 0))

    @pl.when(block == 0)
    def _():
        w_in_bar_NKE[...] = jnp.zeros_like(w_in_bar_NKE)
        w_out_bar_NEV[...] = jnp.zeros_like(w_out_bar_NEV)

    @pl.when(tile == 0)
    def _():
        sum_RKC[block] = jnp.zeros(q.shape, sum_RKC.dtype)

    count = tiling.groups_read_of(piece * tiling.blocks + block, tile)

    @pl.when(count < tiling.tile)
    def _():
        gates_bar_SGC[...] = jnp.zeros_like(gates_bar_SGC)

    def visit(first, count):
        for state in range(count):
            n = first + state
            gate = gates_SGC[n]
            hidden, gelu_vjp = jax.vjp(gelu, product_of_rows(w_in_NKE[n], q))
            if branch.is_bounded:
                # The hidden layer may be four times as wide as z: the gate weighs z.
                hidden = hidden.astype(q.dtype)
                z = product_of_rows(w_out_NEV[n], hidden)
                gates_bar_SGC[n], z_bar = branch.bars(z, out_bar.astype(z.dtype))
                z_bar = (gate * z_bar).astype(q.dtype)
                hidden_bar = product(w_out_NEV[n], z_bar)
                w_out_bar_NEV[n] += product_of_lanes(hidden, z_bar)
            else:
                p = product(w_out_NEV[n], out_bar)
                gates_bar_SGC[n] = jnp.sum(p * hidden, axis=0, keepdims=True)
                w_out_bar_NEV[n] += product_of_lanes((gate * hidden).astype(q.dtype), out_bar)
                hidden_bar = gate * p
            (inner_bar,) = gelu_vjp(hidden_bar)
            inner_bar = inner_bar.astype(q.dtype)
            sum_RKC[block] += product(w_in_NKE[n], inner_bar)
            w_in_bar_NKE[n] += product_of_lanes(q, inner_bar)

    tiles.for_groups(count, visit, _together(w_in_NKE))

    @pl.when(tile == tiling.tiles - 1)
    def _():
        q_bar_KC[...] = sum_RKC[block].astype(q_bar_KC.dtype)

"""The dense read of matrix states on a TPU, and its gradients.

Forward, the states of a group lie side by side and the queries weighed by their gates below each other: the
sum over the states is the matrix product's own, [M_1 M_2 ...] [g_1 q; g_2 q; ...].

Where all of a head's states are in VMEM at once, and backward, they come by copies of the kernel's own, which
rounds them, and forward turns them. Elsewhere XLA does so before.

Backward, with P_n = M_n dO, the gradients are dq = sum_n g_n P_n, dg_n = <P_n, q> and dM_n = (g_n q) dO^T: no
read is made again. The states' gradients grow in VMEM while the tokens of a piece pass; the queries' wait
there until every state has passed.

Shapes: R blocks of a piece; the rest in `_tpu_tiling`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._platform import has_wide_units
from pallas_kernels._state import state_dtype
from pallas_kernels._tpu_lanes import from_lanes, lanes, product, product_of_lanes
from pallas_kernels._tpu_states import bring, scratch
from pallas_kernels.state_read import _tpu_tiling as tiles
from pallas_kernels.state_read._tpu_tiling import BackwardSpecs, ForwardSpecs, Tiling

# Tokens of a block, backward and forward, and of one matrix product. A matrix unit 256 wide passes over the
# products of 16 states so quickly that a block has to be long for its start and end not to matter.
_LENGTH = 512
_LENGTH_WIDE = 2048
_COLUMNS = 512
_GROUP = 4
# Rows of weighed queries in one matrix product: of 16 states with 128 dims.
_ROWS = 2048
# In VMEM: a forward block's queries, results and sums.
_TOKENS_BYTES = 4 << 20


def read(q: jax.Array, gates: jax.Array, states: jax.Array, segment_length: int | None) -> jax.Array:
    """Return sum_n gates_n q M_n; shapes as in `pallas_kernels.state_read.gated_state_read`."""
    batch, tokens, heads, key_dim = q.shape
    value_dim = states.shape[4]
    most = tiles.room_for_states() // (2 * key_dim * value_dim * q.dtype.itemsize)
    # States that pass for each block anew should pass seldom.
    length, weigh_in = _LENGTH if states.shape[1] <= most else 2 * _LENGTH, state_dtype(q)
    if has_wide_units():  # the vector unit multiplies twice as many numbers of bfloat16
        token_bytes = 2 * (key_dim + value_dim) * q.dtype.itemsize + value_dim * weigh_in.itemsize
        products = max(1, min(_LENGTH_WIDE, _TOKENS_BYTES // token_bytes) // _COLUMNS)
        length, weigh_in = products * _COLUMNS, q.dtype
    tiling = tiles.fit(
        tokens=tokens,
        states=states.shape[1],
        segment_length=segment_length,
        group=_GROUP,
        most=most,
        length=length,
    )
    states_BNHKV = tiles.pad_states(states, tiling)
    rows, columns = states_BNHKV.shape[3:]
    count = tiles.beside(rows, tiling)
    specs = ForwardSpecs(tiling)
    brings = tiling.tiles == 1 and count == 1
    own = [pltpu.VMEM((states_BNHKV.shape[1], columns, rows), q.dtype), *scratch(states_BNHKV)]
    out_BHVT = pl.pallas_call(
        functools.partial(_read_kernel, tiling, count, weigh_in),
        grid=(batch, heads, tiling.blocks, tiling.tiles),
        in_specs=[
            specs.tokens(rows),
            specs.gates(),
            pl.BlockSpec(memory_space=pl.ANY) if brings else specs.states(columns, count * rows, count),
        ],
        out_specs=specs.tokens(columns),
        out_shape=jax.ShapeDtypeStruct((batch, heads, columns, tiling.tokens), q.dtype),
        scratch_shapes=[pltpu.VMEM((columns, tiling.length), state_dtype(q)), *(own if brings else [])],
        compiler_params=tiles.parameters(
            "parallel", "parallel", "arbitrary" if brings else "parallel", "arbitrary"
        ),
        name="state_read",
    )(
        lanes(q, tiling.tokens),
        tiles.gate_groups(gates, tiling),
        states_BNHKV if brings else tiles.side_by_side(states_BNHKV.astype(q.dtype), count),
    )
    return from_lanes(out_BHVT, tokens, value_dim)


def _read_kernel(tiling: Tiling, beside, weigh_in, q_KC, gates_SGC, states, out_VC, sum_VC, *own):
    block, tile = pl.program_id(2), pl.program_id(3)
    states_xVy, *copied = own or (states,)
    if copied:

        def turn(state, copied_KV):
            states_xVy[state] = copied_KV.astype(states_xVy.dtype).T

        copied_2GKV, arrivals = copied
        bring(states, copied_2GKV, arrivals, turn, when=block == 0)

    @pl.when(tile == 0)
    def _():
        sum_VC[...] = jnp.zeros_like(sum_VC)

    def visit(first, count):
        groups = [first + group for group in range(count)]
        start, more = first * (tiling.group // beside), count * (tiling.group // beside)
        states = jnp.concatenate([states_xVy[start + index] for index in range(more)], axis=1)
        for start in range(0, tiling.length, _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, tiling.length))
            q = q_KC[:, columns].astype(weigh_in)
            weighed = [
                (gates_SGC[group, n : n + 1, columns].astype(weigh_in) * q).astype(q_KC.dtype)
                for group in groups
                for n in range(tiling.group)
            ]
            sum_VC[:, columns] += product(states, jnp.concatenate(weighed, axis=0))

    tiles.for_groups(tiling.groups_read_of(block, tile), visit, _together(tiling, q_KC.shape[0]))

    @pl.when(tile == tiling.tiles - 1)
    def _():
        out_VC[...] = sum_VC[...].astype(out_VC.dtype)


def _together(tiling, key_dim):
    return max(1, min(tiling.tile, _ROWS // (tiling.group * key_dim)))


def read_bar(
    q: jax.Array, gates: jax.Array, states: jax.Array, out_bar: jax.Array, segment_length: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, gates and states, the last in float32; shapes as in the op."""
    batch, tokens, heads, key_dim = q.shape
    count, value_dim = states.shape[1], states.shape[4]
    dtype = state_dtype(q)
    tiling = tiles.fit(
        tokens=tokens,
        states=count,
        segment_length=segment_length,
        group=_GROUP,
        most=tiles.room_for_states() // (2 * key_dim * value_dim * (q.dtype.itemsize + dtype.itemsize)),
        length=_LENGTH,
        piece=tiles.room_for_queries() // (key_dim * dtype.itemsize),
    )
    q_BHKT = lanes(q, tiling.tokens)
    gates_BHSGT = tiles.gate_groups(gates, tiling)
    states_BNHKV = tiles.pad_states(states, tiling)
    rows, columns = states_BNHKV.shape[3:]
    specs = BackwardSpecs(tiling)
    q_bar, gates_bar, states_bar = pl.pallas_call(
        functools.partial(_read_bar_kernel, tiling),
        grid=(batch, heads, tiling.pieces, tiling.tiles, tiling.blocks),
        in_specs=[
            specs.tokens(rows),
            specs.gates(),
            pl.BlockSpec(memory_space=pl.ANY),
            specs.tokens(columns),
        ],
        out_specs=[specs.tokens_bar(rows), specs.gates_bar(), specs.states_bar(rows, columns)],
        out_shape=[
            jax.ShapeDtypeStruct(q_BHKT.shape, q.dtype),
            jax.ShapeDtypeStruct(gates_BHSGT.shape, dtype),
            jax.ShapeDtypeStruct((tiling.pieces, *states_BNHKV.shape), dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiling.blocks, rows, tiling.length), dtype),
            pltpu.VMEM((tiling.tile * tiling.group, rows, columns), q.dtype),
            *scratch(states_BNHKV, tiling.tile * tiling.group),
        ],
        compiler_params=tiles.parameters("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
        name="state_read_backward",
    )(q_BHKT, gates_BHSGT, states_BNHKV, lanes(out_bar.astype(q.dtype), tiling.tokens))
    return (
        from_lanes(q_bar, tokens, key_dim),
        tiles.from_gate_groups(gates_bar, tokens, count),
        jnp.sum(states_bar, axis=0)[:, :count, :, :key_dim, :value_dim],
    )


def _read_bar_kernel(
    tiling: Tiling,
    q_KC,
    gates_SGC,
    states_BNHKV,
    out_bar_VC,
    q_bar_KC,
    gates_bar_SGC,
    states_bar_NKV,
    sum_RKC,
    states_NKV,
    copied_2GKV,
    arrivals,
):
    piece, tile, block = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    q, out_bar = q_KC[...].astype(sum_RKC.dtype), out_bar_VC[...]
    key_dim, value_dim = q.shape[0], out_bar.shape[0]

    def begin(state, copied_KV):
        states_NKV[state] = copied_KV.astype(states_NKV.dtype)
        states_bar_NKV[state] = jnp.zeros(states_bar_NKV.shape[1:], states_bar_NKV.dtype)

    count = states_NKV.shape[0]
    bring(states_BNHKV, copied_2GKV, arrivals, begin, when=block == 0, first=tile * count, count=count)

    @pl.when(tile == 0)
    def _():
        sum_RKC[block] = jnp.zeros_like(q)

    count = tiling.groups_read_of(piece * tiling.blocks + block, tile)

    @pl.when(count < tiling.tile)
    def _():
        gates_bar_SGC[...] = jnp.zeros_like(gates_bar_SGC)

    def visit(first, count):
        states = pl.ds(first * tiling.group, count * tiling.group)
        p = product(states_NKV[states].reshape(-1, value_dim), out_bar)
        q_bar, weighed = sum_RKC[block], []
        for state in range(count * tiling.group):
            group, n = first + state // tiling.group, state % tiling.group
            gate = gates_SGC[group, n : n + 1]
            p_KC = p[state * key_dim : (state + 1) * key_dim]
            q_bar += gate * p_KC
            gates_bar_SGC[group, n : n + 1] = jnp.sum(p_KC * q, axis=0, keepdims=True)
            weighed.append((gate * q).astype(q_KC.dtype))
        sum_RKC[block] = q_bar
        more = product_of_lanes(jnp.concatenate(weighed, axis=0), out_bar)
        states_bar_NKV[states] += more.reshape(-1, key_dim, value_dim)

    tiles.for_groups(count, visit, _together(tiling, key_dim))

    @pl.when(tile == tiling.tiles - 1)
    def _():
        q_bar_KC[...] = sum_RKC[block].astype(q_bar_KC.dtype)

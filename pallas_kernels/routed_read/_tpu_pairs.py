"""The sparse read of matrix states on a TPU, and its gradients.

The states of a head pass one after the other, and with each the rows of the pairs that read it: they are
gathered in VMEM, row by row, multiplied by the state, and the results put into rows of their pairs. No two
pairs share a row, so nothing is added up on the way. When all states have passed, each token weighs what its
choices read, in order.

Backward, with P_j = M_j dO of a token's j-th choice, the gradients are dq = sum_j g_j P_j, dg_j = <P_j, q>
and dM_n = sum of (g q)^T dO over the pairs that read state n. P_j takes the place that g_j q had.

A step of the grid is a piece of a head's tokens. States come by copies of this kernel's own, some at a time,
those to come while others are read, up to the last one that is read; their gradients come and go likewise,
since every piece adds to them.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N states, k choices, C tokens of a piece, P rows
of pairs, L numbers of a list, G states of a group, R rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._expected import loop
from pallas_kernels.routed_read._tpu_lists import Plan

# Rows that are multiplied by a state together.
_TOGETHER = 128
# Rows that are copied in a turn of a loop.
_UNROLLED = 8
# Tokens that are weighed in a turn of a loop.
_TOKENS = 128
_SUBLANES = 8
# A group of states lies in one of two places in turn; one of gradients, which leaves again, in one of three.
_PLACES, _PLACES_BAR = 2, 3
_SEMANTICS = ("parallel", "parallel", "arbitrary")


def read(
    q: jax.Array, gates: jax.Array, lists: jax.Array, states: jax.Array, plan: Plan, vmem: int | None
) -> jax.Array:
    """Return sum_j gates_j q M_j [B, T, H, V]; `lists` as `_tpu_lists.lists` makes them."""
    batch, tokens, heads, key_dim = q.shape
    value_dim = states.shape[4]
    specs = _Specs(plan, heads)
    out = pl.pallas_call(
        functools.partial(_read_kernel, plan),
        grid=(batch, heads, plan.pieces),
        in_specs=[specs.list(), specs.tokens(key_dim), specs.gates(), specs.anywhere()],
        out_specs=specs.tokens(value_dim),
        out_shape=jax.ShapeDtypeStruct((batch, heads, plan.pieces * plan.length, value_dim), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((plan.length, key_dim), jnp.float32),
            pltpu.VMEM((plan.rows, value_dim), jnp.float32),
            pltpu.VMEM((_TOGETHER, key_dim), jnp.float32),
            pltpu.VMEM((_TOGETHER, value_dim), jnp.float32),
            pltpu.VMEM((_PLACES, plan.group, key_dim, value_dim), q.dtype),
            pltpu.SemaphoreType.DMA((_PLACES,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS, vmem_limit_bytes=_limit(vmem)),
        name="routed_read",
    )(lists, _heads_first(q, plan), _gates_first(gates, plan), _padded(states.astype(q.dtype), plan))
    return out[:, :, :tokens].swapaxes(1, 2)


def _read_kernel(
    plan,
    list_L,
    q_CK,
    gates_kC,
    states_BNHKV,
    out_CV,
    wide_CK,
    pairs_PV,
    rows_RK,
    reads_RV,
    states_2GKV,
    arrivals,
):
    row, head = pl.program_id(0), pl.program_id(1)
    groups = _groups(list_L, plan)

    def arriving(group):
        place = jax.lax.rem(group, _PLACES)
        for state in range(plan.group):
            source = states_BNHKV.at[row, group * plan.group + state, head]
            yield pltpu.make_async_copy(source, states_2GKV.at[place, state], arrivals.at[place])

    def widen(tokens):
        wide_CK[tokens] = q_CK[tokens].astype(jnp.float32)

    def read_group(group, _):
        @pl.when(group + 1 < groups)
        def _():
            _start(arriving(group + 1))

        _wait(arriving(group))
        states_GKV = states_2GKV.at[jax.lax.rem(group, _PLACES)]

        def visit(state, first, count):
            def gather(row, pair):
                return [(rows_RK, row, wide_CK, _token(pair, plan))]

            _for_rows(plan, list_L, first, count, gather)
            reads_RV[...] = _product(rows_RK[...].astype(q_CK.dtype), states_GKV[state], 1, 0)
            _for_rows(plan, list_L, first, count, lambda row, pair: [(pairs_PV, pair, reads_RV, row)])

        _for_blocks(plan, list_L, group, visit)

    def weigh(tokens):
        gates = gates_kC[:, tokens].T
        out = jnp.zeros((_TOKENS, out_CV.shape[1]), jnp.float32)
        for choice in range(plan.choices):
            out += gates[:, choice : choice + 1] * pairs_PV[_of_choice(choice, tokens, plan)]
        out_CV[tokens] = out.astype(out_CV.dtype)

    _start(arriving(0))
    _for_tokens(plan, widen)
    loop(groups, read_group, None, expected=plan.states / plan.group)
    _for_tokens(plan, weigh)


def read_bar(
    q: jax.Array,
    gates: jax.Array,
    lists: jax.Array,
    states: jax.Array,
    out_bar: jax.Array,
    plan: Plan,
    vmem: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, gates and states, the last two in float32."""
    batch, tokens, heads, key_dim = q.shape
    count, value_dim = states.shape[1], states.shape[4]
    specs = _Specs(plan, heads)
    q_BHTK, gates_BHkT = _heads_first(q, plan), _gates_first(gates, plan)
    states_BNHKV = _padded(states.astype(q.dtype), plan)
    matrices = (plan.group, key_dim, value_dim)
    q_bar, gates_bar, states_bar = pl.pallas_call(
        functools.partial(_read_bar_kernel, plan),
        grid=(batch, heads, plan.pieces),
        in_specs=[
            specs.list(),
            specs.tokens(key_dim),
            specs.gates(),
            specs.tokens(value_dim),
            specs.anywhere(),
            specs.anywhere(),
        ],
        out_specs=[specs.tokens(key_dim), specs.gates(), specs.anywhere()],
        out_shape=[
            jax.ShapeDtypeStruct(q_BHTK.shape, q.dtype),
            jax.ShapeDtypeStruct(gates_BHkT.shape, jnp.float32),
            jax.ShapeDtypeStruct(states_BNHKV.shape, jnp.float32),
        ],
        # States that nothing reads are not visited: their gradient is the zeros that come in.
        input_output_aliases={5: 2},
        scratch_shapes=[
            pltpu.VMEM((plan.length, value_dim), jnp.float32),
            pltpu.VMEM((plan.rows, key_dim), jnp.float32),
            pltpu.VMEM((_TOGETHER, key_dim), jnp.float32),
            pltpu.VMEM((_TOGETHER, value_dim), jnp.float32),
            pltpu.VMEM((_PLACES, *matrices), q.dtype),
            pltpu.VMEM((_PLACES_BAR, *matrices), jnp.float32),
            pltpu.SemaphoreType.DMA((_PLACES,)),
            pltpu.SemaphoreType.DMA((_PLACES_BAR,)),
            pltpu.SemaphoreType.DMA((_PLACES_BAR,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS, vmem_limit_bytes=_limit(vmem)),
        name="routed_read_backward",
    )(
        lists,
        q_BHTK,
        gates_BHkT,
        _heads_first(out_bar.astype(q.dtype), plan),
        states_BNHKV,
        jnp.zeros(states_BNHKV.shape, jnp.float32),
    )
    return (
        q_bar[:, :, :tokens].swapaxes(1, 2),
        gates_bar[:, :, : plan.choices, :tokens].transpose(0, 3, 1, 2),
        states_bar[:, :count],
    )


def _read_bar_kernel(
    plan,
    list_L,
    q_CK,
    gates_kC,
    out_bar_CV,
    states_BNHKV,
    _,
    q_bar_CK,
    gates_bar_kC,
    states_bar_BNHKV,
    wide_CV,
    pairs_PK,
    rows_RK,
    rows_RV,
    states_2GKV,
    sums_3GKV,
    arrivals,
    arrivals_bar,
    departures,
):
    row, head, dtype = pl.program_id(0), pl.program_id(1), q_CK.dtype
    groups = _groups(list_L, plan)

    def arriving(group):
        place, place_bar = jax.lax.rem(group, _PLACES), jax.lax.rem(group, _PLACES_BAR)
        for state in range(plan.group):
            here = row, group * plan.group + state, head
            target, sums = states_2GKV.at[place, state], sums_3GKV.at[place_bar, state]
            yield pltpu.make_async_copy(states_BNHKV.at[here], target, arrivals.at[place])
            yield pltpu.make_async_copy(states_bar_BNHKV.at[here], sums, arrivals_bar.at[place_bar])

    def departing(group):
        place = jax.lax.rem(group, _PLACES_BAR)
        for state in range(plan.group):
            target = states_bar_BNHKV.at[row, group * plan.group + state, head]
            yield pltpu.make_async_copy(sums_3GKV.at[place, state], target, departures.at[place])

    def weigh(tokens):
        wide_CV[tokens] = out_bar_CV[tokens].astype(jnp.float32)
        q, gates = q_CK[tokens].astype(jnp.float32), gates_kC[:, tokens].T
        for choice in range(plan.choices):
            pairs_PK[_of_choice(choice, tokens, plan)] = gates[:, choice : choice + 1] * q

    def read_group(group, _):
        # The place that the next gradients come to was left two groups ago.
        @pl.when(group >= 2)
        def _():
            _wait(departing(group - 2))

        @pl.when(group + 1 < groups)
        def _():
            _start(arriving(group + 1))

        _wait(arriving(group))
        states_GKV = states_2GKV.at[jax.lax.rem(group, _PLACES)]
        sums_GKV = sums_3GKV.at[jax.lax.rem(group, _PLACES_BAR)]

        def visit(state, first, count):
            def gather(row, pair):
                return [(rows_RK, row, pairs_PK, pair), (rows_RV, row, wide_CV, _token(pair, plan))]

            _for_rows(plan, list_L, first, count, gather)
            there = jax.lax.broadcasted_iota(jnp.int32, (_TOGETHER, 1), 0) < count
            weighed, out_bar = (jnp.where(there, rows[...], 0.0).astype(dtype) for rows in (rows_RK, rows_RV))
            sums_GKV[state] += _product(weighed, out_bar, 0, 0)
            rows_RK[...] = _product(out_bar, states_GKV[state], 1, 1)
            _for_rows(plan, list_L, first, count, lambda row, pair: [(pairs_PK, pair, rows_RK, row)])

        _for_blocks(plan, list_L, group, visit)
        _start(departing(group))

    def weigh_bar(tokens):
        q, gates = q_CK[tokens].astype(jnp.float32), gates_kC[:, tokens].T
        q_bar, bars = jnp.zeros_like(q), jnp.zeros_like(gates)
        place = jax.lax.broadcasted_iota(jnp.int32, gates.shape, 1)
        for choice in range(plan.choices):
            p = pairs_PK[_of_choice(choice, tokens, plan)]
            q_bar += gates[:, choice : choice + 1] * p
            bars += jnp.where(place == choice, jnp.sum(p * q, axis=1, keepdims=True), 0.0)
        q_bar_CK[tokens] = q_bar.astype(dtype)
        gates_bar_kC[:, tokens] = bars.T

    _start(arriving(0))
    _for_tokens(plan, weigh)
    loop(groups, read_group, None, expected=plan.states / plan.group)
    for last in (1, 2):

        @pl.when(groups >= last)
        def _(last=last):
            _wait(departing(groups - last))

    _for_tokens(plan, weigh_bar)


def _for_tokens(plan: Plan, act):
    """Call `act` with the tokens of a piece, some at a time."""

    def turn(number, _):
        act(pl.ds(pl.multiple_of(number * _TOKENS, _TOKENS), _TOKENS))

    jax.lax.fori_loop(0, plan.length // _TOKENS, turn, None)


def _groups(list_L, plan: Plan):
    """Return how many groups of states a piece reads, or might: 1 or more."""
    return list_L[plan.states + 1]


def _start(copies):
    for copy in copies:
        copy.start()


def _wait(copies):
    for copy in copies:
        copy.wait()


def _for_blocks(plan: Plan, list_L, group, visit):
    """Call `visit` with a state in its group, where in the list a block starts, and how many pairs it has."""

    def state_turn(state, _):
        number = group * plan.group + state
        start, end = list_L[number], list_L[number + 1]

        def block_turn(block, _):
            first = start + block * _TOGETHER
            visit(state, plan.heading + first, jnp.minimum(end - first, _TOGETHER))

        loop(pl.cdiv(end - start, _TOGETHER), block_turn, None, expected=plan.expected_blocks(_TOGETHER))

    jax.lax.fori_loop(0, plan.group, state_turn, None)


def _for_rows(plan, list_L, first, count, copy):
    """Copy a block's rows: `copy` tells of a row and its pair what to copy, (to, its row, from, its row)."""

    def turn(row, rows):
        copies = []
        for more in range(rows):
            copies += copy(row + more, list_L[first + row + more])
        # All are loaded before one is stored, so that none waits for another.
        loaded = [source[pl.ds(at, 1)] for _, _, source, at in copies]
        for (target, at, _, _), value in zip(copies, loaded, strict=True):
            target[pl.ds(at, 1)] = value

    whole = jax.lax.div(count, _UNROLLED)
    done, (many, few) = whole * _UNROLLED, plan.expected_rows(_TOGETHER, _UNROLLED)
    loop(whole, lambda i, _: turn(pl.multiple_of(i * _UNROLLED, _UNROLLED), _UNROLLED), None, expected=many)
    loop(count - done, lambda i, _: turn(done + i, 1), None, expected=few)


def _token(pair, plan: Plan):
    return jax.lax.bitwise_and(pair, jnp.int32((1 << plan.bits) - 1))


def _of_choice(choice: int, tokens, plan: Plan):
    return pl.ds(pl.multiple_of((choice << plan.bits) + tokens.start, _TOKENS), tokens.size)


def _product(a, b, axis_a: int, axis_b: int):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _limit(vmem: int | None) -> int | None:
    return None if vmem is None else int(0.95 * vmem)


def _heads_first(x_BTHK: jax.Array, plan: Plan) -> jax.Array:
    more = plan.pieces * plan.length - x_BTHK.shape[1]
    return jnp.pad(x_BTHK, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)


def _gates_first(gates_BTHk: jax.Array, plan: Plan) -> jax.Array:
    """Tokens along lanes, where few choices take little room: [B, H, k, T]."""
    more = plan.pieces * plan.length - gates_BTHk.shape[1]
    return jnp.pad(gates_BTHk, ((0, 0), (0, more), (0, 0), (0, -plan.choices % _SUBLANES))).transpose(
        0, 2, 3, 1
    )


def _padded(states_BNHKV: jax.Array, plan: Plan) -> jax.Array:
    more = plan.states - states_BNHKV.shape[1]
    return jnp.pad(states_BNHKV, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)))


class _Specs:
    """What is in VMEM, and the list in SMEM, at a step of the grid (batch, heads, pieces)."""

    def __init__(self, plan: Plan, heads: int):
        self._plan, self._heads = plan, heads

    def list(self) -> pl.BlockSpec:
        """The block [L] of an array [B H P L]."""
        plan, heads = self._plan, self._heads
        return pl.BlockSpec(
            (plan.numbers,), lambda b, h, p: ((b * heads + h) * plan.pieces + p,), memory_space=pltpu.SMEM
        )

    def tokens(self, dim: int) -> pl.BlockSpec:
        """The block [C, dim] of an array [B, H, T, dim]."""
        return pl.BlockSpec((None, None, self._plan.length, dim), lambda b, h, p: (b, h, p, 0))

    def gates(self) -> pl.BlockSpec:
        """The block [k, C] of an array [B, H, k, T]."""
        rows = self._plan.choices + -self._plan.choices % _SUBLANES
        return pl.BlockSpec((None, None, rows, self._plan.length), lambda b, h, p: (b, h, 0, p))

    def anywhere(self) -> pl.BlockSpec:
        """The whole array [B, N, H, K, V], left in the memory where it lies."""
        return pl.BlockSpec(memory_space=pl.ANY)

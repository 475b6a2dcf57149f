"""The sparse read of matrix states on a TPU where neighbouring tokens agree, and its gradients.

A block of tokens reads every state that one of them has chosen, and no other: the union of their choices. A
token weighs with 0 what others chose. The states of a head are in VMEM as a whole, so that any can be next.

Backward, with P_n = M_n dO, the gradients are dq = sum_n g_n P_n, dg_n = <P_n, q> and dM_n = (g_n q) dO^T.

Tokens lie along lanes: a gate is then one number a lane, and weighing by it a broadcast along sublanes.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N states, k choices, L numbers of a list, C tokens
of a block, A tokens of a step of the grid, G states that are copied together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._expected import loop
from pallas_kernels._platform import has_wide_units
from pallas_kernels._tpu_lanes import from_lanes, lanes, product, product_of_lanes
from pallas_kernels._tpu_states import bring, scratch
from pallas_kernels.routed_read._tpu_chains import ROWS, SUBLANES, Plan

# States that a block reads in a turn of a loop, and in a turn of the loop over what then remains: what a turn
# does is straight code, at whose end the matrix unit runs empty.
_MANY, _FEW = 8, 4


def read(
    q: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    chains: jax.Array,
    states: jax.Array,
    plan: Plan,
    vmem: int | None,
) -> jax.Array:
    """Return sum_j gates_j q M_j [B, T, H, V]; `chains` as `lists` makes them."""
    batch, tokens, heads, _ = q.shape
    states_BNHKV = _padded(states)
    key_dim, value_dim = states_BNHKV.shape[3:]
    specs = _Specs(plan, heads)
    out = pl.pallas_call(
        functools.partial(_read_kernel, plan, q.dtype if has_wide_units() else jnp.float32),
        grid=(batch, heads, plan.steps),
        in_specs=[
            specs.list(),
            specs.tokens(key_dim),
            specs.choices(),
            specs.choices(),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=specs.tokens(value_dim),
        out_shape=jax.ShapeDtypeStruct((batch, heads, value_dim, plan.tokens), q.dtype),
        scratch_shapes=[
            pltpu.VMEM((value_dim, plan.length), jnp.float32),
            pltpu.VMEM((plan.states, value_dim, key_dim), q.dtype),
            *scratch(states_BNHKV),
        ],
        compiler_params=_parameters(vmem),
        name="routed_read_union",
    )(chains, lanes(q, plan.tokens), _choices(gates, plan, 0), _choices(indices, plan, -1), states_BNHKV)
    return from_lanes(out, tokens, states.shape[4])


def _read_kernel(
    plan: Plan,
    weigh_in,
    list_L,
    q_KA,
    gates_kA,
    indices_kA,
    states_BNHKV,
    out_VA,
    sum_VC,
    states_NVK,
    copied_2GKV,
    arrivals,
):
    def turn(state, copied_KV):
        states_NVK[state] = copied_KV.T.astype(states_NVK.dtype)

    bring(states_BNHKV, copied_2GKV, arrivals, turn, when=pl.program_id(2) == 0)

    def read_block(block, tokens):
        sum_VC[...] = jnp.zeros_like(sum_VC)

        def read_states(numbers, places):
            q, weighed = q_KA[:, tokens].astype(weigh_in), []
            for number in numbers:
                mine = indices_kA[:, tokens] == number
                gate = jnp.sum(jnp.where(mine, gates_kA[:, tokens], 0.0), axis=0, keepdims=True)
                weighed.append((gate.astype(q.dtype) * q).astype(q_KA.dtype))
            matrices = [states_NVK[place] for place in places]
            if q_KA.shape[0] % 128 == 0:
                sum_VC[...] += product(jnp.concatenate(matrices, axis=1), jnp.concatenate(weighed, axis=0))
            else:  # side by side they would not be whole registers
                sum_VC[...] += sum(map(product, matrices, weighed))

        _for_states(plan, list_L, block, read_states)
        out_VA[:, tokens] = sum_VC[...].astype(out_VA.dtype)

    _for_blocks(plan, read_block)


def read_bar(
    q: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    chains: jax.Array,
    states: jax.Array,
    out_bar: jax.Array,
    plan: Plan,
    vmem: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, gates and states, the last two in float32."""
    batch, tokens, heads, key_dim = q.shape
    value_dim = states.shape[4]
    states_BNHKV = _padded(states)
    rows, columns = states_BNHKV.shape[3:]
    gates_BHkT = _choices(gates, plan, 0)
    specs = _Specs(plan, heads)
    q_bar, gates_bar, states_bar = pl.pallas_call(
        functools.partial(_read_bar_kernel, plan),
        grid=(batch, heads, plan.steps),
        in_specs=[
            specs.list(),
            specs.tokens(rows),
            specs.choices(),
            specs.choices(),
            specs.tokens(columns),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[specs.tokens(rows), specs.choices(), specs.states(rows, columns)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, rows, plan.tokens), q.dtype),
            jax.ShapeDtypeStruct(gates_BHkT.shape, jnp.float32),
            jax.ShapeDtypeStruct(states_BNHKV.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, plan.length), jnp.float32),
            pltpu.VMEM((gates_BHkT.shape[2], plan.length), jnp.float32),
            pltpu.VMEM((plan.states, rows, columns), q.dtype),
            *scratch(states_BNHKV),
        ],
        compiler_params=_parameters(vmem),
        name="routed_read_union_backward",
    )(
        chains,
        lanes(q, plan.tokens),
        gates_BHkT,
        _choices(indices, plan, -1),
        lanes(out_bar.astype(q.dtype), plan.tokens),
        states_BNHKV,
    )
    return (
        from_lanes(q_bar, tokens, key_dim),
        from_lanes(gates_bar, tokens, plan.choices),
        states_bar[..., :key_dim, :value_dim],
    )


def _read_bar_kernel(
    plan: Plan,
    list_L,
    q_KA,
    gates_kA,
    indices_kA,
    out_bar_VA,
    states_BNHKV,
    q_bar_KA,
    gates_bar_kA,
    states_bar_NKV,
    sum_KC,
    sum_kC,
    states_NKV,
    copied_2GKV,
    arrivals,
):
    def begin(state, copied_KV):
        states_NKV[state] = copied_KV.astype(states_NKV.dtype)
        states_bar_NKV[state] = jnp.zeros(copied_KV.shape, jnp.float32)

    bring(states_BNHKV, copied_2GKV, arrivals, begin, when=pl.program_id(2) == 0)

    def read_block(block, tokens):
        q, out_bar = q_KA[:, tokens].astype(jnp.float32), out_bar_VA[:, tokens]
        key_dim = q.shape[0]
        sum_KC[...] = jnp.zeros_like(sum_KC)
        sum_kC[...] = jnp.zeros_like(sum_kC)

        def read_states(numbers, places):
            p = product(jnp.concatenate([states_NKV[place] for place in places], axis=0), out_bar)
            q_bar, gates_bar, weighed = sum_KC[...], sum_kC[...], []
            for at, number in enumerate(numbers):
                mine = indices_kA[:, tokens] == number
                gate = jnp.sum(jnp.where(mine, gates_kA[:, tokens], 0.0), axis=0, keepdims=True)
                p_KC = p[at * key_dim : (at + 1) * key_dim]
                q_bar += gate * p_KC
                gates_bar += jnp.where(mine, jnp.sum(p_KC * q, axis=0, keepdims=True), 0.0)
                weighed.append((gate * q).astype(q_KA.dtype))
            sum_KC[...], sum_kC[...] = q_bar, gates_bar
            more = product_of_lanes(jnp.concatenate(weighed, axis=0), out_bar)
            for at, place in enumerate(places):
                states_bar_NKV[place] += more[at * key_dim : (at + 1) * key_dim]

        _for_states(plan, list_L, block, read_states)
        q_bar_KA[:, tokens] = sum_KC[...].astype(q_bar_KA.dtype)
        gates_bar_kA[:, tokens] = sum_kC[...]

    _for_blocks(plan, read_block)


def _for_blocks(plan: Plan, visit):
    """Call `visit` with a block's number and its tokens among those of a step."""

    def turn(block, _):
        visit(block, pl.ds(pl.multiple_of(block * plan.length, plan.length), plan.length))

    jax.lax.fori_loop(0, plan.blocks, turn, None)


def _for_states(plan: Plan, list_L, block, visit):
    """Call `visit` with states that a block reads, some at a time: their numbers, and where they lie.

    Beyond the last the number is N, which no token has chosen, and lies where the block's first state does.
    """
    start = block * plan.chain
    first = list_L[start + 1]

    def turn(size, _, number):
        numbers, places = [], []
        for _ in range(size):
            numbers.append(number)
            places.append(jnp.where(number < plan.states, number, first))
            number = list_L[start + 2 + number]
        visit(numbers, places)
        return number

    groups = pl.cdiv(list_L[start], _FEW)
    whole = jax.lax.div(groups, _MANY // _FEW)
    rest = groups - whole * (_MANY // _FEW)
    many, few = plan.expected_turns(_MANY, _FEW)
    number = loop(whole, functools.partial(turn, _MANY), first, expected=many)
    loop(rest, functools.partial(turn, _FEW), number, expected=few)


def _choices(x_BTHk: jax.Array, plan: Plan, absent: int) -> jax.Array:
    """Gates or indices with tokens along lanes, [B, H, k, T], filled up with `absent`."""
    more = ((0, 0), (0, plan.tokens - x_BTHk.shape[1]), (0, 0), (0, -plan.choices % SUBLANES))
    return jnp.pad(x_BTHk, more, constant_values=absent).transpose(0, 2, 3, 1)


def _padded(states_BNHKV: jax.Array) -> jax.Array:
    key_dim, value_dim = states_BNHKV.shape[3:]
    return jnp.pad(states_BNHKV, ((0, 0), (0, 0), (0, 0), (0, -key_dim % ROWS), (0, -value_dim % ROWS)))


def _parameters(vmem: int | None) -> pltpu.CompilerParams:
    limit = None if vmem is None else int(0.95 * vmem)
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
    )


class _Specs:
    """What is in VMEM, and the list in SMEM, at a step of the grid (batch, heads, steps)."""

    def __init__(self, plan: Plan, heads: int):
        self._plan, self._heads = plan, heads
        self._step = plan.blocks * plan.length

    def list(self) -> pl.BlockSpec:
        """The block [L] of an array [B H A L]."""
        plan, heads = self._plan, self._heads
        return pl.BlockSpec(
            (plan.numbers,), lambda b, h, t: ((b * heads + h) * plan.steps + t,), memory_space=pltpu.SMEM
        )

    def tokens(self, dim: int) -> pl.BlockSpec:
        """The block [dim, A] of an array [B, H, dim, T]."""
        return pl.BlockSpec((None, None, dim, self._step), lambda b, h, t: (b, h, 0, t))

    def choices(self) -> pl.BlockSpec:
        """The block [k, A] of an array [B, H, k, T]."""
        return self.tokens(self._plan.choices + -self._plan.choices % SUBLANES)

    def states(self, rows: int, columns: int) -> pl.BlockSpec:
        """A head's states [N, K, V] of an array [B, N, H, K, V]."""
        block = (None, self._plan.states, None, rows, columns)
        # There once: the next head's would need as much room again.
        return pl.BlockSpec(block, lambda b, h, t: (b, 0, h, 0, 0), pipeline_mode=pl.Buffered(1))

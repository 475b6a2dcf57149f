"""The linear memory on a TPU, M_t = a M_{t-1} + k_t^T v_t from zero, and its gradients.

With g_t the logarithm of the retentions from the start of a token's block through the token, a block reads
O = (Q K^T o D) V + e^g Q M_0, D_tj = e^(g_t - g_j) for t >= j, and goes on from M_C = e^(g_C) M_0 +
(e^(g_C - g) K)^T V. Where a document starts, marks change, and nothing passes from one mark to another.

Backward, blocks pass from the last one; what a segment's blocks start from is computed again, out of the
state at the end of the segment before, and nothing but that is in HBM. For the retention's gradient no
product is made: dg_t = <q_t, dq_t> - <k_t, dk_t>, and at a block's end <dM_C, M_C> more.

Shapes: as in `_tpu_layout`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._kept import keep
from pallas_kernels._state import state_dtype
from pallas_kernels.chunk_memory._tpu_layout import SEMANTICS, Cut, Specs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(
    cuts: tuple[Cut, Cut],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_retention: jax.Array,
    starts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the reads and the states at segment ends.

    Args:
      cuts: how tokens are cut, forward and backward.
      q: [B, tokens, P H, K].
      k: [B, tokens, P H, K].
      v: [B, tokens, P H, V], times what a token writes.
      log_retention: [B, tokens, P H], float32, the logarithm of each token's retention.
      starts: [B, tokens], float32, 1 where a document starts; or None.

    Returns:
      [B, tokens, P H, V] in q's dtype, and [B, S, P H, K, V] in float32.
    """
    return _forward(cuts, q, k, v, log_retention, starts)[0]


def _forward(cuts, *arguments):
    cut, _ = cuts
    q, k, v, log_BTH, marks_BT = _padded(cut, *arguments)
    batch, tokens, heads, key_dim = q.shape
    value_dim = v.shape[3]
    specs = Specs(cut)
    out, states = pl.pallas_call(
        functools.partial(_forward_kernel, cut),
        grid=(batch, heads // cut.group, cut.segments * cut.blocks),
        in_specs=[
            specs.lanes(key_dim),
            specs.lanes(key_dim),
            specs.lanes(value_dim),
            specs.coefficients(),
            *([specs.marks()] if cut.documents else []),
        ],
        out_specs=[specs.lanes(value_dim), specs.states(key_dim, value_dim)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, value_dim, tokens), q.dtype),
            jax.ShapeDtypeStruct((batch, cut.segments, heads, key_dim, value_dim), state_dtype(q)),
        ],
        scratch_shapes=[pltpu.VMEM((cut.group, value_dim, key_dim), state_dtype(q))],
        compiler_params=SEMANTICS,
        name="linear_memory",
    )(
        _lanes(q),
        _lanes(k),
        _lanes(v),
        cut.grouped(log_BTH),
        *([] if marks_BT is None else [marks_BT[:, None]]),
    )
    states = keep(states)
    return (cut.unpad(_from_lanes(out)), states), (arguments, states)


def _padded(cut, q, k, v, log_retention, starts):
    marks = None if starts is None else cut.within_blocks(cut.pad(starts))
    return *map(cut.pad, (q, k, v)), cut.within_blocks(cut.pad(log_retention)), marks


def _forward_kernel(cut: Cut, q_HKC, k_HKC, v_HVC, log_HC, *refs):
    *marks, out_HVC, states_HKV, sum_HVK = refs
    block = pl.program_id(2)

    @pl.when(cut.starts_anew(block))
    def _():
        sum_HVK[...] = jnp.zeros_like(sum_HVK)

    decays = _Decays(log_HC, *marks)
    for head in range(cut.group):
        q, k_CK, v, state = q_HKC[head], k_HKC[head].T, v_HVC[head], sum_HVK[head]
        enter, leave, kept = decays.across(head)
        scores = (_product(k_CK, q) * decays.within(head)).astype(q.dtype)
        read = _product(v, scores) + _product(state.astype(q.dtype), q) * enter
        out_HVC[head] = read.astype(out_HVC.dtype)
        sum_HVK[head] = kept * state + _product(_scaled(v, leave), k_CK)

    @pl.when(cut.ends_segment(block))
    def _():
        for head in range(cut.group):
            states_HKV[head] = sum_HVK[head].T


class _Decays:
    """What is left of a write after some tokens of a block."""

    def __init__(self, log_HC, marks_1C=None):
        length = log_HC.shape[1]
        self._log, self._log_columns = log_HC[...], log_HC[...].T
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
        seen, self._marks = row <= column, None
        if marks_1C is not None:
            self._marks = marks_1C[...]
            seen &= self._marks == self._marks.T
        self._unseen = jnp.where(seen, 0.0, -jnp.inf)

    def within(self, head):
        """[C written, C read]: 0 where a token was written after the read."""
        between = self._log[head : head + 1] - self._log_columns[:, head : head + 1]
        return jnp.exp(between + self._unseen)

    def across(self, head):
        """From the block's start to a token [1, C], from a token to the end, from start to end [1, 1]."""
        log = self._log[head : head + 1]
        enter, leave, kept = jnp.exp(log), jnp.exp(log[:, -1:] - log), jnp.exp(log[:, -1:])
        if self._marks is not None:
            last = self._marks[:, -1:]
            enter, leave, kept = (
                jnp.where(same, x, 0.0)
                for same, x in ((self._marks == 0, enter), (self._marks == last, leave), (last == 0, kept))
            )
        return enter, leave, kept


def _backward(cuts, residuals, bars):
    _, cut = cuts
    arguments, states = residuals
    q, k, v, log_BTH, marks_BT = _padded(cut, *arguments)
    out_bar, states_bar = cut.pad(bars[0]), bars[1]
    batch, tokens, heads, key_dim = q.shape
    value_dim = v.shape[3]
    dtype = state_dtype(q)
    again = cut.blocks - 1  # blocks that are written again to know what the others start from

    def segment(step):
        return cut.segments - 1 - jax.lax.div(step, jnp.int32(again + cut.blocks))

    def written(step):
        """The block that a step writes: first on the way forward, then back."""
        turn = jax.lax.rem(step, jnp.int32(again + cut.blocks))
        return segment(step) * cut.blocks + again - jnp.abs(turn - again)

    def read(step):
        """The block that a step reads; on the way forward the last one, which is loaded just once."""
        turn = jax.lax.rem(step, jnp.int32(again + cut.blocks))
        return segment(step) * cut.blocks + again - jnp.maximum(turn - again, 0)

    writes, reads = Specs(cut, written), Specs(cut, read)
    q_bar, k_bar, v_bar, log_bar = pl.pallas_call(
        functools.partial(_backward_kernel, cut),
        grid=(batch, heads // cut.group, cut.segments * (again + cut.blocks)),
        in_specs=[
            reads.lanes(key_dim),
            writes.lanes(key_dim),
            writes.lanes(value_dim),
            reads.lanes(value_dim),
            writes.coefficients(),
            reads.states(key_dim, value_dim, before=1),
            reads.states(key_dim, value_dim),
            *([writes.marks()] if cut.documents else []),
        ],
        out_specs=[
            reads.lanes(key_dim),
            reads.lanes(key_dim),
            reads.lanes(value_dim),
            reads.coefficients(),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, key_dim, tokens), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, key_dim, tokens), k.dtype),
            jax.ShapeDtypeStruct((batch, heads, value_dim, tokens), v.dtype),
            jax.ShapeDtypeStruct((batch, heads // cut.group, cut.group, tokens), dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((cut.blocks, cut.group, key_dim, value_dim), dtype),
            pltpu.VMEM((cut.group, key_dim, value_dim), dtype),
        ],
        compiler_params=SEMANTICS,
        name="linear_memory_backward",
    )(
        _lanes(q),
        _lanes(k),
        _lanes(v),
        _lanes(out_bar),
        cut.grouped(log_BTH),
        states,
        states_bar,
        *([] if marks_BT is None else [marks_BT[:, None]]),
    )
    tokens_bar = (cut.unpad(_from_lanes(x)) for x in (q_bar, k_bar, v_bar))
    log_bar = cut.unpad(cut.within_blocks(cut.ungrouped(log_bar), reverse=True))
    return *tokens_bar, log_bar, None


def _backward_kernel(
    cut: Cut,
    q_HKC,
    k_HKC,
    v_HVC,
    out_bar_HVC,
    log_HC,
    before_HKV,
    states_bar_HKV,
    *refs,
):
    *marks, q_bar_HKC, k_bar_HKC, v_bar_HVC, log_bar_HC, starts_NHKV, state_bar_HKV = refs
    again = cut.blocks - 1
    step = pl.program_id(2)
    turn = jax.lax.rem(step, jnp.int32(again + cut.blocks))
    first_segment = step >= (cut.segments - 1) * (again + cut.blocks)
    decays = _Decays(log_HC, *marks)

    @pl.when(turn == 0)
    def _():
        empty = cut.independent | first_segment
        starts_NHKV[0] = jnp.where(empty, jnp.zeros_like(before_HKV[...]), before_HKV[...])

    @pl.when(turn < again)
    def _():
        for head in range(cut.group):
            _, leave, kept = decays.across(head)
            write = _product_of_lanes(k_HKC[head], _scaled(v_HVC[head], leave))
            starts_NHKV[turn + 1, head] = kept * starts_NHKV[turn, head] + write

    @pl.when(turn == again)
    def _():
        if cut.independent:
            state_bar_HKV[...] = states_bar_HKV[...]
        else:
            later = jnp.where(step == turn, jnp.zeros_like(state_bar_HKV[...]), state_bar_HKV[...])
            state_bar_HKV[...] = later + states_bar_HKV[...]

    @pl.when(turn >= again)
    def _():
        block = again - (turn - again)
        for head in range(cut.group):
            enter, leave, kept = decays.across(head)
            within = decays.within(head)
            q, k, v, out_bar = q_HKC[head], k_HKC[head], v_HVC[head], out_bar_HVC[head]
            start, state_bar = starts_NHKV[block, head], state_bar_HKV[head]
            dtype = q.dtype
            scores = (_product_of_rows(k, q) * within).astype(dtype)
            scores_bar = (_product_of_rows(v, out_bar) * within).astype(dtype)

            q_bar = _product(k, scores_bar) + _product(start.astype(dtype), out_bar) * enter
            k_bar_later = _product(state_bar.astype(dtype), v) * leave
            k_bar = _product_of_lanes(q, scores_bar) + k_bar_later
            v_bar = _product(state_bar.T.astype(dtype), k) * leave
            v_bar += _product_of_lanes(out_bar, scores)
            q_bar_HKC[head] = q_bar.astype(q_bar_HKC.dtype)
            k_bar_HKC[head] = k_bar.astype(k_bar_HKC.dtype)
            v_bar_HVC[head] = v_bar.astype(v_bar_HVC.dtype)

            wide_q, wide_k = q.astype(q_bar.dtype), k.astype(k_bar.dtype)
            log_bar = jnp.sum(wide_q * q_bar - wide_k * k_bar, axis=0, keepdims=True)
            end = kept * jnp.sum(state_bar * start, keepdims=True)
            end += jnp.sum(wide_k * k_bar_later, keepdims=True)
            last = jax.lax.broadcasted_iota(jnp.int32, log_bar.shape, 1) == log_bar.shape[1] - 1
            log_bar_HC[head : head + 1] = log_bar + jnp.where(last, end, 0.0)
            state_bar_HKV[head] = kept * state_bar + _product_of_lanes(_scaled(q, enter), out_bar)


linear.defvjp(_forward, _backward)


def _lanes(x_BTHK: jax.Array) -> jax.Array:
    return x_BTHK.transpose(0, 2, 3, 1)


def _from_lanes(x_BHKT: jax.Array) -> jax.Array:
    return x_BHKT.transpose(0, 3, 1, 2)


def _scaled(x: jax.Array, factor_1C: jax.Array) -> jax.Array:
    return (x.astype(factor_1C.dtype) * factor_1C).astype(x.dtype)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _product_of_lanes(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

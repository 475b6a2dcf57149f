"""The gradients of the rules that write errors, on a TPU: blocks pass from the last to the first.

What a segment's blocks start from is computed again, out of the state at the end of the segment before, and
waits in VMEM: nothing but that state is in HBM.

Shapes: as in `_tpu_layout`; C tokens of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_memory._tpu_errors_block import (
    Numbers,
    Rule,
    advance,
    between,
    block,
    carried_by,
    of_head,
    start_anew,
    wide,
    write,
)
from pallas_kernels.chunk_memory._tpu_layout import SEMANTICS, Cut, Specs
from pallas_kernels.chunk_memory._tpu_shares import Coefficients


def run_bar(
    cut: Cut, rule: Rule, tokens, coefficients: Coefficients, marks, initial, states, out_bar, states_bar
):
    """Return the gradients of tokens, coefficients and the initial memory.

    The arguments are those of `_tpu_errors_forward.run`, what it returned, and the gradients of that.
    """
    key_dim, value_dim = tokens[0].shape[2], tokens[2].shape[2]
    batch, heads = tokens[0].shape[:2]
    again = cut.blocks - 1  # blocks that are written again to know what the others start from
    turns = again + cut.blocks

    def segment(step):
        return cut.segments - 1 - jax.lax.div(step, jnp.int32(turns))

    def written(step):
        """The block that a step writes: first on the way forward, then back."""
        turn = jax.lax.rem(step, jnp.int32(turns))
        return segment(step) * cut.blocks + again - jnp.abs(turn - again)

    def read(step):
        """The block that a step reads; on the way forward the last one, which is loaded just once."""
        turn = jax.lax.rem(step, jnp.int32(turns))
        return segment(step) * cut.blocks + again - jnp.maximum(turn - again, 0)

    writes, reads = Specs(cut, written), Specs(cut, read)
    matrix = pltpu.VMEM((cut.group, key_dim, value_dim), jnp.float32)
    start = pltpu.VMEM((cut.blocks, cut.group, key_dim, value_dim), jnp.float32)
    keys, values = reads.lanes(key_dim), reads.lanes(value_dim)
    coefficient_bars = jax.tree.map(lambda _: reads.coefficients(), coefficients)
    return pl.pallas_call(
        functools.partial(_kernel, cut, rule),
        grid=(batch, heads // cut.group, cut.segments * turns),
        in_specs=[
            (keys, writes.lanes(key_dim), writes.lanes(value_dim)),
            jax.tree.map(lambda _: writes.coefficients(), coefficients),
            None if marks is None else writes.marks(2),
            reads.initial(key_dim, value_dim),
            (reads.states(key_dim, value_dim, before=1),) * rule.carried,
            values,
            (reads.states(key_dim, value_dim),) * rule.carried,
        ],
        out_specs=((keys, keys, values), coefficient_bars, reads.initial(key_dim, value_dim)),
        out_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tokens, coefficients, initial)
        ),
        scratch_shapes=[(start,) * rule.carried, (matrix,) * rule.carried],
        compiler_params=SEMANTICS,
        name="titans_memory_backward" if rule.momentum else "delta_memory_backward",
    )(tokens, coefficients, marks, initial, states, out_bar, states_bar)


def _kernel(
    cut: Cut,
    rule: Rule,
    tokens,
    coefficients,
    marks,
    initial,
    before,
    out_bar,
    states_bar,
    tokens_bar,
    coefficients_bar,
    initial_bar,
    starts,
    state_bar,
):
    again = cut.blocks - 1
    step = pl.program_id(2)
    turn = jax.lax.rem(step, jnp.int32(again + cut.blocks))
    first_segment = step >= (cut.segments - 1) * (again + cut.blocks)
    anew = cut.independent | first_segment
    numbers = Numbers(rule, coefficients, marks)
    shares, shares_vjp = jax.vjp(numbers.shares, numbers.all)

    @pl.when(step == 0)
    def _():
        for ref in (initial_bar, *state_bar):
            ref[...] = jnp.zeros_like(ref)

    @pl.when((turn == 0) & anew)
    def _():
        start_anew([ref.at[0] for ref in starts], initial)

    @pl.when((turn == 0) & ~anew)
    def _():
        for ref, matrix in zip(starts, before, strict=True):
            ref[0] = matrix[...]

    def heads(index):
        """Yield every head with its coefficients, its shares and what the block of an index starts from."""
        for head in range(cut.group):
            one = of_head(numbers.all, head)
            carried = carried_by([ref.at[index] for ref in starts], initial, one, head)
            yield head, one, of_head(shares, head), carried

    @pl.when(turn < again)
    def _():
        for head, one, own, carried in heads(turn):
            k, v = (wide(ref, head) for ref in tokens[1:])
            _, earlier = between(rule, one, numbers.columns(head), numbers.marks)
            written = write(rule, carried, k, v, one.step, own, earlier)
            for ref, matrix in zip(starts, advance(rule, carried, k, written, own), strict=True):
                ref[turn + 1, head] = matrix

    @pl.when(turn == again)
    def _():
        for ref, bar in zip(state_bar, states_bar, strict=True):
            ref[...] = bar[...] if cut.independent else ref[...] + bar[...]

    @pl.when(turn >= again)
    def _():
        bars = []
        for head, one, own, carried in heads(again - (turn - again)):
            columns = numbers.columns(head)

            def run(carried, q, k, v, one, own, columns=columns):
                return block(rule, carried, q, k, v, one, columns, numbers.marks, own)

            _, vjp = jax.vjp(run, carried, *(wide(ref, head) for ref in tokens), one, own)
            after_bar = tuple(ref[head] for ref in state_bar)
            carried_bar, *values_bar, one_bar, own_bar = vjp((after_bar, wide(out_bar, head)))
            for ref, bar in zip(tokens_bar, values_bar, strict=True):
                ref[head] = bar.astype(ref.dtype)
            for ref, bar in zip(state_bar, carried_bar, strict=False):
                ref[head] = bar
            if one.restart is not None:
                initial_bar[head] += carried_bar[-1]
            bars.append((one_bar, own_bar))
        one_bar, own_bar = jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=0), *bars)
        (more,) = shares_vjp(own_bar)
        jax.tree.map(lambda ref, a, b: ref.__setitem__(..., a + b), coefficients_bar, one_bar, more)

    @pl.when((turn == again + again) & anew)
    def _():
        initial_bar[...] += state_bar[0][...]

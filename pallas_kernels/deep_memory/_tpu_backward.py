"""The gradients of the MLP memory on a TPU: blocks of chunks pass from the last to the first.

The states that the chunks of a block start from are computed again, from the one that the block starts from,
and wait in VMEM in the tokens' dtype: products would round them to it anyway.

Shapes as in `_tpu_layout`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._expected import when_seldom
from pallas_kernels.deep_memory._tpu_chunk import advance, chunk, decay_shares, write
from pallas_kernels.deep_memory._tpu_layout import Cut, Specs, scratch, segment_ends


def run_bar(
    cut: Cut,
    tokens,
    coefficients,
    initial,
    restarts,
    ends,
    kept,
    read_bar,
    states_bar,
    final_bar,
    anchor_bar,
):
    """Return the gradients of tokens, coefficients and initial weights.

    The arguments are those of `_tpu_forward.run`, and what it returned or the gradient of it.
    """
    batch, dtype = tokens[0].shape[0], tokens[0].dtype
    specs = Specs(cut, 1, reverse=True)
    key_dim, hidden = cut.key_dim, cut.hidden
    start = pltpu.VMEM((cut.block, key_dim, hidden), dtype)
    leaf = scratch(cut, 1)
    in_place = specs.in_place()
    return pl.pallas_call(
        functools.partial(_kernel, cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, cut.heads, cut.blocks),
            in_specs=[
                (specs.tokens(),) * 3,
                specs.coefficients(),
                (in_place, in_place) if cut.documents else None,
                cut.tree(specs.kept()),
                specs.tokens(),
                (specs.states(key_dim, hidden), specs.states(hidden, key_dim)),
                cut.tree(in_place),
                (in_place, in_place) if cut.anchored else None,
            ],
            out_specs=((specs.tokens(),) * 3, specs.coefficients(), (specs.initial(),) * 2),
            scratch_shapes=[
                cut.tree(start),
                cut.tree(leaf),
                cut.tree(leaf),
                (leaf, leaf) if cut.anchored else None,
            ],
        ),
        out_shape=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tokens, coefficients, initial)
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=cut.vmem_limit
        ),
        name="deep_memory_backward",
    )(
        restarts.reshape(-1),
        ends.reshape(-1),
        tokens,
        coefficients,
        initial if cut.documents else None,
        kept,
        read_bar,
        states_bar,
        final_bar,
        anchor_bar,
    )


def _kernel(
    cut: Cut,
    restarts,
    ends,
    tokens,
    coefficients,
    initial,
    kept,
    read_bar,
    states_bar,
    final_bar,
    anchor_bar,
    tokens_bar,
    coefficients_bar,
    initial_bar,
    starts,
    state,
    state_bar,
    landing,
):
    row, head, step = (pl.program_id(axis) for axis in range(3))
    block = cut.blocks - 1 - step
    first = block * cut.block
    here = pl.ds(head, 1)
    weights, weights_bar = ((tree[0][0], tree[1][0]) for tree in (state, state_bar))

    def restarted(index):
        return restarts[row * cut.blocks * cut.block + index] != 0

    def inputs(c):
        rows = pl.ds(pl.multiple_of(c * cut.chunk, cut.chunk), cut.chunk)
        numbers = tuple(coefficients[0, c, i : i + 1] for i in range(coefficients.shape[2]))
        return rows, tuple(ref[rows] for ref in tokens), numbers

    @pl.when(step == 0)
    def _():
        jax.tree.map(_clear, (initial_bar, state_bar))

    @when_seldom(block == ends[2 * row])
    def _():
        # What follows gave it no gradient: nothing, or a segment that does not go on from here.
        jax.tree.map(lambda ref, bar: pltpu.sync_copy(bar.at[row, here], ref), state_bar, final_bar)

    @pl.when(segment_ends(cut, block))
    def _():
        weights_bar[0][...] += states_bar[0][...]
        weights_bar[1][0] += states_bar[1][0].T

    jax.tree.map(lambda ref, start: ref.__setitem__(..., start[...].astype(ref.dtype)), state, kept)
    jax.tree.map(lambda ref, start: ref.__setitem__(0, start[0]), starts, kept)

    def again(c, _):
        _, (_, k, v), numbers = inputs(c)
        before = jax.tree.map(lambda ref: ref[0], state)
        writes = write(before, k, v, numbers[0], cut.branch)
        after = advance(before, k, writes, decay_shares(*numbers[1:]))
        jax.tree.map(lambda ref, leaf: ref.__setitem__(0, leaf), state, after)
        if cut.documents:

            @when_seldom(restarted(first + c + 1))
            def _():
                for ref, start in zip(weights, initial, strict=True):
                    pltpu.sync_copy(start.at[row, here], ref)
                for _, *momentum in state:
                    jax.tree.map(_clear, momentum)

        jax.tree.map(lambda ref, leaf: ref.__setitem__(c + 1, leaf[0].astype(ref.dtype)), starts, state)

    jax.lax.fori_loop(0, cut.block - 1, again, None)

    def restart_bar(index):
        @when_seldom(restarted(index))
        def _():
            for ref, bar in zip(initial_bar, weights_bar, strict=True):
                ref[...] += bar[...]
            jax.tree.map(_clear, state_bar)

    def visit(back, _):
        c = cut.block - 1 - back
        rows, values, numbers = inputs(c)
        start = jax.tree.map(lambda ref, to: ref[c].astype(to.dtype), starts, state_bar)
        _, vjp = jax.vjp(functools.partial(chunk, branch=cut.branch), start, *values, numbers)
        after_bar = jax.tree.map(lambda ref: ref[0], state_bar)
        before_bar, *values_bar, numbers_bar = vjp((after_bar, read_bar[rows].astype(jnp.float32)))
        jax.tree.map(lambda ref, bar: ref.__setitem__(0, bar), state_bar, before_bar)
        for ref, bar in zip(tokens_bar, values_bar, strict=True):
            ref[rows] = bar
        for i, bar in enumerate(numbers_bar):
            coefficients_bar[0, c, i : i + 1] = bar
        if anchor_bar is not None:

            @when_seldom(first + c == ends[2 * row + 1])
            def _():
                for ref, at, bar in zip(weights_bar, landing, anchor_bar, strict=True):
                    pltpu.sync_copy(bar.at[row, here], at)
                    ref[...] += at[...]

        if cut.documents:
            restart_bar(first + c)

    jax.lax.fori_loop(0, cut.block, visit, None)
    if not cut.documents:
        restart_bar(first)


def _clear(ref):
    ref[...] = jnp.zeros_like(ref)

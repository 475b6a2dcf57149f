"""The MLP memory on a TPU, forward: weights and momentum stay in VMEM while the blocks of chunks pass.

Shapes as in `_tpu_layout`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._expected import when_seldom
from pallas_kernels.deep_memory._tpu_chunk import chunk
from pallas_kernels.deep_memory._tpu_layout import Cut, Specs, scratch, segment_ends


def run(
    cut: Cut,
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    coefficients: jax.Array,
    initial: tuple[jax.Array, jax.Array],
    restarts: jax.Array,
    ends: jax.Array,
    *,
    keep: bool,
):
    """Return the reads, the states of segments, the final state, the anchor and the states of blocks.

    Args:
      cut: the cut.
      tokens: queries, keys and values [B, M C, H K].
      coefficients: [B, H, M, R, C] float32.
      initial: W_in [B, H, K, E] and W_out transposed, float32.
      restarts: [B, M] int32, not 0 where the memory starts anew.
      ends: [B, 2] int32, the block whose last state is the final one, the chunk whose first is the anchor.
      keep: whether to return, in the tokens' dtype, the states that blocks start from, for the gradient.
    """
    batch, dtype = tokens[0].shape[0], tokens[0].dtype
    heads = cut.heads_together
    specs = Specs(cut, heads)
    key_dim, hidden = cut.key_dim, cut.hidden

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((batch, *dims), dtype)

    leaf = shape(cut.heads, key_dim, hidden)
    kept = shape(cut.blocks, cut.heads, key_dim, hidden, dtype=dtype)
    return pl.pallas_call(
        functools.partial(_kernel, cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, cut.heads // heads, cut.blocks),
            in_specs=[*(specs.tokens(),) * 3, specs.coefficients(), (specs.in_place(),) * 2],
            out_specs=(
                specs.tokens(),
                (specs.states(key_dim, hidden), specs.states(hidden, key_dim)),
                cut.tree(specs.in_place()),
                (specs.in_place(),) * 2 if cut.anchored else None,
                cut.tree(specs.kept()) if keep else None,
            ),
            scratch_shapes=[cut.tree(scratch(cut, heads))],
        ),
        out_shape=(
            shape(*tokens[0].shape[1:], dtype=dtype),
            (
                shape(cut.segments, cut.heads, key_dim, hidden),
                shape(cut.segments, cut.heads, hidden, key_dim),
            ),
            cut.tree(leaf),
            (leaf, leaf) if cut.anchored else None,
            cut.tree(kept) if keep else None,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=cut.vmem_limit
        ),
        name="deep_memory",
    )(restarts.reshape(-1), ends.reshape(-1), *tokens, coefficients, initial)


def _kernel(
    cut: Cut, restarts, ends, q, k, v, coefficients, initial, read, states, final, anchor, kept, state
):
    row, block = pl.program_id(0), pl.program_id(2)
    first = block * cut.block
    weights = (state[0][0], state[1][0])
    heads = weights[0].shape[0]
    here = pl.ds(pl.program_id(1) * heads, heads)

    def restart(index):
        @when_seldom(restarts[row * cut.blocks * cut.block + index] != 0)
        def _():
            for ref, start in zip(weights, initial, strict=True):
                pltpu.sync_copy(start.at[row, here], ref)
            for _, *momentum in state:
                for ref in momentum:
                    ref[...] = jnp.zeros_like(ref)

    restart(first)
    if kept is not None:
        jax.tree.map(lambda to, ref: to.__setitem__(..., ref[...].astype(to.dtype)), kept, state)

    def visit(c, _):
        if cut.documents:
            restart(first + c)
        if anchor is not None:

            @when_seldom(first + c == ends[2 * row + 1])
            def _():
                for ref, to in zip(weights, anchor, strict=True):
                    pltpu.sync_copy(ref, to.at[row, here])

        rows = pl.ds(pl.multiple_of(c * cut.chunk, cut.chunk), cut.chunk)
        for head in range(heads):
            lanes = pl.ds(head * cut.key_dim, cut.key_dim)
            numbers = tuple(coefficients[head, c, i : i + 1] for i in range(coefficients.shape[2]))
            before = jax.tree.map(lambda ref, head=head: ref[head], state)
            after, out = chunk(before, q[rows, lanes], k[rows, lanes], v[rows, lanes], numbers, cut.branch)
            read[rows, lanes] = out.astype(read.dtype)
            jax.tree.map(lambda ref, leaf, head=head: ref.__setitem__(head, leaf), state, after)

    jax.lax.fori_loop(0, cut.block, visit, None)

    @pl.when(segment_ends(cut, block))
    def _():
        states[0][...] = weights[0][...]
        for head in range(heads):
            states[1][head] = weights[1][head].T

    @when_seldom(block == ends[2 * row])
    def _():
        jax.tree.map(lambda ref, to: pltpu.sync_copy(ref, to.at[row, here]), state, final)

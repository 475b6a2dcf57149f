"""The rules that write errors on a TPU, forward: the state stays in VMEM while the blocks of tokens pass.

Shapes: as in `_tpu_layout`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_memory._tpu_errors_block import (
    Numbers,
    Rule,
    block,
    carried_by,
    of_head,
    start_anew,
    wide,
)
from pallas_kernels.chunk_memory._tpu_layout import SEMANTICS, Cut, Specs
from pallas_kernels.chunk_memory._tpu_shares import Coefficients


def run(cut: Cut, rule: Rule, tokens, coefficients: Coefficients, marks, initial):
    """Return the reads and the states at segments' ends.

    Args:
      cut: the cut.
      rule: the rule.
      tokens: queries, keys and values, [B, P H, dim, T].
      coefficients: [B, P, H, T] float32.
      marks: live and fresh [B, 2, T] float32, or None for delta.
      initial: [B, P H, K, V] float32.

    Returns:
      [B, P H, V, T] in the dtype of the tokens, and of what a state is of [B, S, P H, K, V] float32.
    """
    q, _, v = tokens
    batch, heads, key_dim, length = q.shape
    value_dim = v.shape[2]
    specs = Specs(cut)
    state = jax.ShapeDtypeStruct((batch, cut.segments, heads, key_dim, value_dim), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, cut, rule),
        grid=(batch, heads // cut.group, cut.segments * cut.blocks),
        in_specs=[
            (specs.lanes(key_dim), specs.lanes(key_dim), specs.lanes(value_dim)),
            jax.tree.map(lambda _: specs.coefficients(), coefficients),
            None if marks is None else specs.marks(2),
            specs.initial(key_dim, value_dim),
        ],
        out_specs=(specs.lanes(value_dim), (specs.states(key_dim, value_dim),) * rule.carried),
        out_shape=(jax.ShapeDtypeStruct((batch, heads, value_dim, length), q.dtype), (state,) * rule.carried),
        scratch_shapes=[(pltpu.VMEM((cut.group, key_dim, value_dim), jnp.float32),) * rule.carried],
        compiler_params=SEMANTICS,
        name="titans_memory" if rule.momentum else "delta_memory",
    )(tokens, coefficients, marks, initial)


def _kernel(cut: Cut, rule: Rule, tokens, coefficients, marks, initial, out, states, state):
    index = pl.program_id(2)

    @pl.when(cut.starts_anew(index))
    def _():
        start_anew(state, initial)

    numbers = Numbers(rule, coefficients, marks)
    shares = numbers.shares(numbers.all)
    for head in range(cut.group):
        q, k, v = (wide(ref, head) for ref in tokens)
        one = of_head(numbers.all, head)
        carried = carried_by(state, initial, one, head)
        after, reads = block(
            rule, carried, q, k, v, one, numbers.columns(head), numbers.marks, of_head(shares, head)
        )
        out[head] = reads.astype(out.dtype)
        for ref, matrix in zip(state, after, strict=True):
            ref[head] = matrix

    @pl.when(cut.ends_segment(index))
    def _():
        for ref, matrix in zip(states, state, strict=True):
            ref[...] = matrix[...]

"""What scripts/bench_kernels measures: every op at the sizes of a large model's layer.

Shapes: B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, N states.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import gated_state_read

_HEADS, _DIM, _SEGMENT = 16, 128, 256
_MLP_HEADS, _HIDDEN = 8, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An op at one size, in bfloat16."""

    op: Callable
    """Of arrays; takes `implementation`."""
    shapes: tuple
    """Of its arguments, trees."""
    token_heads: int
    """Tokens times heads, of all rows."""
    products: int
    """FLOPs of its matrix products, forward; as many again for each of two factors backward."""

    def forward(self, implementation: str) -> Callable:
        """Return the op as a function of its arguments."""
        return functools.partial(self.op, implementation=implementation)

    def both(self, implementation: str) -> Callable:
        """Return forward and backward, as a function of the op's arguments and its results' cotangents."""

        def run(bars, *arguments):
            results, vjp = jax.vjp(self.forward(implementation), *arguments)
            return results, vjp(bars)

        return run

    @property
    def bars(self):
        """Shapes of the results, and so of their cotangents."""
        return jax.eval_shape(self.forward("xla"), *self.shapes)

    @property
    def bytes(self) -> int:
        """That have to be read and written, forward."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.shapes, self.bars)))


def _array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def state_read(tokens: int, *, batch: int = 4) -> Case:
    """The dense read of all segments' matrices by every token."""
    states = tokens // _SEGMENT
    q = _array(batch, tokens, _HEADS, _DIM)
    gates = _array(batch, tokens, _HEADS, states, dtype=jnp.float32)
    return Case(
        op=gated_state_read,
        shapes=(q, gates, _array(batch, states, _HEADS, _DIM, _DIM)),
        token_heads=batch * tokens * _HEADS,
        products=2 * batch * tokens * _HEADS * states * _DIM * _DIM,
    )


def mlp_state_read(tokens: int, *, batch: int = 4) -> Case:
    """The dense read of all segments' MLPs by every token."""
    states = tokens // _SEGMENT
    q = _array(batch, tokens, _MLP_HEADS, _DIM)
    gates = _array(batch, tokens, _MLP_HEADS, states, dtype=jnp.float32)
    weights = (
        _array(batch, states, _MLP_HEADS, _DIM, _HIDDEN),
        _array(batch, states, _MLP_HEADS, _HIDDEN, _DIM),
    )
    return Case(
        op=gated_state_read,
        shapes=(q, gates, weights),
        token_heads=batch * tokens * _MLP_HEADS,
        products=4 * batch * tokens * _MLP_HEADS * states * _DIM * _HIDDEN,
    )


CASES = {"gated_state_read": state_read, "gated_state_read, MLP": mlp_state_read}

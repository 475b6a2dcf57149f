"""What scripts/bench_kernels measures: every op at the sizes of a large model's layer.

Shapes: B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, N states.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import chunk_memory, deep_memory, gated_state_read

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


def matrix_memory(rule: str, tokens: int, *, batch: int = 4) -> Case:
    """Writes to a matrix and online reads; its products leave out those of pairs of tokens, which vary."""
    array = _array(batch, tokens, _HEADS, _DIM)
    more = {"swla": ("previous_step",), "titans": ("momentum",)}
    names = ("retention", "step", *more.get(rule, ()))
    # Written and read; where errors are written, k M too, and titans has a momentum in each.
    matrices = {"delta": 3, "titans": 6}.get(rule, 2)

    def op(q, k, v, *coefficients, implementation):
        return chunk_memory(
            q,
            k,
            v,
            rule=rule,
            **dict(zip(names, coefficients, strict=True)),
            segment_length=_SEGMENT,
            implementation=implementation,
        )

    return Case(
        op=op,
        shapes=(array, array, array, *[_array(*array.shape[:3], dtype=jnp.float32)] * len(names)),
        token_heads=batch * tokens * _HEADS,
        products=2 * matrices * batch * tokens * _HEADS * _DIM * _DIM,
    )


def mlp_memory(objective: str, tokens: int, *, batch: int = 4) -> Case:
    """Writes to an MLP and online reads; its products leave out those of pairs of tokens, which vary."""
    array = _array(batch, tokens, _MLP_HEADS, _DIM)
    names = ("retention", "step") + (("momentum",) if objective == "l2" else ())
    initial = (
        _array(_MLP_HEADS, _DIM, _HIDDEN, dtype=jnp.float32),
        _array(_MLP_HEADS, _HIDDEN, _DIM, dtype=jnp.float32),
    )

    def op(q, k, v, initial_state, *coefficients, implementation):
        return deep_memory(
            q,
            k,
            v,
            objective=objective,
            **dict(zip(names, coefficients, strict=True)),
            segment_length=_SEGMENT,
            initial_state=initial_state,
            implementation=implementation,
        )

    return Case(
        op=op,
        shapes=(array, array, array, initial, *[_array(*array.shape[:3], dtype=jnp.float32)] * len(names)),
        token_heads=batch * tokens * _MLP_HEADS,
        # Written: the error, its way back and both layers' changes; read: both layers.
        products=14 * batch * tokens * _MLP_HEADS * _DIM * _HIDDEN,
    )


CASES = {
    "chunk_memory, delta": functools.partial(matrix_memory, "delta"),
    "chunk_memory, linear": functools.partial(matrix_memory, "linear"),
    "chunk_memory, swla": functools.partial(matrix_memory, "swla"),
    "chunk_memory, titans": functools.partial(matrix_memory, "titans"),
    "deep_memory, dla": functools.partial(mlp_memory, "dot"),
    "deep_memory, titans": functools.partial(mlp_memory, "l2"),
    "gated_state_read": state_read,
    "gated_state_read, MLP": mlp_state_read,
}

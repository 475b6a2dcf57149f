"""What scripts/bench_kernels measures: every op at the sizes of a large model's layer.

The sparse read's loops turn as the choices of tokens tell. By pairs they are taken to be spread evenly over
all states, by unions to agree as a trained model's do (`pallas_kernels/routed_read`).

Shapes: B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, N states, k choices.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import (
    chunk_memory,
    decode_step,
    deep_memory,
    gated_state_read,
    routed_state_read,
    short_convolution,
)
from pallas_kernels._state import OnlineState

_HEADS, _DIM, _SEGMENT, _TOP_K = 16, 128, 256, 2
_SLOTS = 64
TOKENS = 4096
"""Of a row, where nothing else is said."""
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
    has_gradient: bool = True
    """Whether it can be run backward."""
    donated: tuple[int, ...] = ()
    """Which arguments may be overwritten."""
    untouched: int = 0
    """Bytes of arguments and results that are neither read nor written."""

    def forward(self, implementation: str) -> Callable:
        """Return the op as a function of its arguments."""
        return functools.partial(self.op, implementation=implementation)

    def both(self, implementation: str) -> Callable:
        """Return forward and backward, as a function of the op's arguments and its results' cotangents."""

        def run(bars, *arguments):
            results, vjp = jax.vjp(self.forward(implementation), *arguments)
            # Whole numbers have no gradient.
            return results, [bar for bar in vjp(bars) if not _is_empty(bar)]

        return run

    def whole(self, implementation: str) -> tuple[Callable, tuple]:
        """Return all that the op can do, as a function, and the shapes of its arguments."""
        if self.has_gradient:
            return self.both(implementation), (self.bars, *self.shapes)
        return self.forward(implementation), self.shapes

    @property
    def bars(self):
        """Shapes of the results, and so of their cotangents."""
        return jax.eval_shape(self.forward("xla"), *self.shapes)

    @property
    def bytes(self) -> int:
        """That have to be read and written, forward."""
        leaves = jax.tree.leaves((self.shapes, self.bars))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) - self.untouched


def _is_empty(bar) -> bool:
    return getattr(bar, "dtype", None) == jax.dtypes.float0


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Return the shape of an argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def state_read(tokens: int, *, batch: int = 4) -> Case:
    """The dense read of all segments' matrices by every token."""
    states = tokens // _SEGMENT
    q = array(batch, tokens, _HEADS, _DIM)
    gates = array(batch, tokens, _HEADS, states, dtype=jnp.float32)
    return Case(
        op=gated_state_read,
        shapes=(q, gates, array(batch, states, _HEADS, _DIM, _DIM)),
        token_heads=batch * tokens * _HEADS,
        products=2 * batch * tokens * _HEADS * states * _DIM * _DIM,
    )


def mlp_state_read(tokens: int, *, batch: int = 4) -> Case:
    """The dense read of all segments' MLPs by every token."""
    states = tokens // _SEGMENT
    q = array(batch, tokens, _MLP_HEADS, _DIM)
    gates = array(batch, tokens, _MLP_HEADS, states, dtype=jnp.float32)
    weights = (
        array(batch, states, _MLP_HEADS, _DIM, _HIDDEN),
        array(batch, states, _MLP_HEADS, _HIDDEN, _DIM),
    )
    return Case(
        op=gated_state_read,
        shapes=(q, gates, weights),
        token_heads=batch * tokens * _MLP_HEADS,
        products=4 * batch * tokens * _MLP_HEADS * states * _DIM * _HIDDEN,
    )


def matrix_memory(rule: str, tokens: int, *, batch: int = 4) -> Case:
    """Writes to a matrix and online reads; its products leave out those of pairs of tokens, which vary."""
    x = array(batch, tokens, _HEADS, _DIM)
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
        shapes=(x, x, x, *[array(*x.shape[:3], dtype=jnp.float32)] * len(names)),
        token_heads=batch * tokens * _HEADS,
        products=2 * matrices * batch * tokens * _HEADS * _DIM * _DIM,
    )


def sparse_read(kernel: str, tokens: int, *, batch: int = 4) -> Case:
    """The read of two states by every token."""

    def op(q, gates, indices, states, *, implementation):
        return sparse(kernel, implementation)(q, gates, indices, states)

    q = array(batch, tokens, _HEADS, _DIM)
    states = array(batch, tokens // _SEGMENT, _HEADS, _DIM, _DIM)
    pairs = (batch, tokens, _HEADS, _TOP_K)
    return Case(
        op=op,
        shapes=(q, array(*pairs, dtype=jnp.float32), array(*pairs, dtype=jnp.int32), states),
        token_heads=batch * tokens * _HEADS,
        products=2 * batch * tokens * _HEADS * _TOP_K * _DIM * _DIM,
    )


def sparse(kernel: str, implementation: str) -> Callable:
    """Return the sparse read by one of its kernels, where a TPU's is asked for."""
    if implementation == "tpu":
        implementation = f"tpu_{kernel}"
    return functools.partial(routed_state_read, implementation=implementation)


def decoding(slots: int = _SLOTS, *, batch: int = 64) -> Case:
    """One token of decoding, a linear memory, reading two cached states a head."""
    vector, number = array(batch, _HEADS, _DIM), array(batch, _HEADS, dtype=jnp.float32)
    online = array(batch, _HEADS, _DIM, _DIM, dtype=jnp.float32)
    states = array(batch, slots, _HEADS, _DIM, _DIM)
    chosen = (batch, _HEADS, _TOP_K)

    def op(weights, states, q, k, v, gates, indices, online_gate, retention, step, slot, *, implementation):
        read, state, states = decode_step(
            OnlineState(weights=weights),
            q,
            k,
            v,
            states,
            gates,
            indices,
            online_gate=online_gate,
            slot=slot,
            rule="linear",
            retention=retention,
            step=step,
            implementation=implementation,
        )
        return read, state.weights, states

    selected = batch * _TOP_K * _HEADS * _DIM * _DIM * states.dtype.itemsize
    return Case(
        op=op,
        shapes=(
            online,
            states,
            *[vector] * 3,
            array(*chosen, dtype=jnp.float32),
            array(*chosen, dtype=jnp.int32),
            *[number] * 3,
            array(batch, dtype=jnp.int32),
        ),
        token_heads=batch * _HEADS,
        products=0,
        has_gradient=False,
        donated=(0, 1),
        # Few rows end a segment at a time.
        untouched=2 * states.size * states.dtype.itemsize - selected,
    )


def mlp_memory(objective: str, tokens: int, *, batch: int = 4) -> Case:
    """Writes to an MLP and online reads; its products leave out those of pairs of tokens, which vary."""
    x = array(batch, tokens, _MLP_HEADS, _DIM)
    names = ("retention", "step") + (("momentum",) if objective == "l2" else ())
    initial = (
        array(_MLP_HEADS, _DIM, _HIDDEN, dtype=jnp.float32),
        array(_MLP_HEADS, _HIDDEN, _DIM, dtype=jnp.float32),
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
        shapes=(x, x, x, initial, *[array(*x.shape[:3], dtype=jnp.float32)] * len(names)),
        token_heads=batch * tokens * _MLP_HEADS,
        # Written: the error, its way back and both layers' changes; read: both layers.
        products=14 * batch * tokens * _MLP_HEADS * _DIM * _HIDDEN,
    )


def convolution(tokens: int, *, batch: int = 4) -> Case:
    """Queries of what a map returns; it has no matrix products, and memory is its bound."""

    def op(x, taps, document_ids, *, implementation):
        return short_convolution(
            x,
            taps,
            heads=_HEADS,
            normalize=True,
            document_ids=document_ids,
            implementation=implementation,
        )

    return Case(
        op=op,
        shapes=(
            array(batch, tokens, _HEADS * _DIM),
            array(4, _HEADS * _DIM, dtype=jnp.float32),
            array(batch, tokens, dtype=jnp.int32),
        ),
        token_heads=batch * tokens * _HEADS,
        products=0,
    )


CASES = {
    "chunk_memory, delta": functools.partial(matrix_memory, "delta"),
    "chunk_memory, linear": functools.partial(matrix_memory, "linear"),
    "chunk_memory, swla": functools.partial(matrix_memory, "swla"),
    "chunk_memory, titans": functools.partial(matrix_memory, "titans"),
    "deep_memory, dla": functools.partial(mlp_memory, "dot"),
    "deep_memory, titans": functools.partial(mlp_memory, "l2"),
    "decode_step": lambda tokens: decoding(),
    "gated_state_read": state_read,
    "gated_state_read, MLP": mlp_state_read,
    "routed_state_read, pairs": functools.partial(sparse_read, "pairs"),
    "routed_state_read, union": functools.partial(sparse_read, "union"),
    "short_convolution": convolution,
}

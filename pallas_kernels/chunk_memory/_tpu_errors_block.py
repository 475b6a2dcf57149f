"""One block of the rules that write errors, delta and titans, on values in a TPU's kernel.

A token writes k_t^T u_t, u_t = h_t (v_t - k_t M'_t), where M'_t is the memory whose error it is: with delta
a_t M_{t-1}, with titans the one at the start of its chunk, so that a block may have many. With G_jt what is
left in M_t of the write of token j, G'_jt the same in M'_t, and b, f and b', f' of the block's start (M, S),
  (I + L^T) U = h (V - b' K M - f' K S), L_jt = h_t <k_j, k_t> G'_jt, 0 but for earlier tokens,
  O = (G o K Q^T)^T U + b Q M + f Q S,
  M_C = b_C M + f_C S + (G_C K)^T U, S_C = e_C S + (E_C K)^T U (Titans eq. 13-14; Gated DeltaNet).
Where documents restart from an initial memory, that is carried too, and enters as M and S do.

Shapes: C tokens of a block, H heads of a group, K key dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_memory._tpu_products import (
    MATMUL,
    MATMUL_TRANSPOSED,
    TRANSPOSED_MATMUL,
    dot,
    solve,
)
from pallas_kernels.chunk_memory._tpu_shares import (
    Coefficients,
    Marks,
    Shares,
    block_shares,
    chunk_start,
    kept_between,
    moved_between,
    next_columns,
)

type State = tuple[jax.Array, ...]
"""The memory and, with titans, the momentum: [K, V] float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How tokens write."""

    momentum: bool
    """Titans; else delta."""
    chunk: int
    """Tokens of a chunk, at whose start titans takes its errors: a power of two, 128 at most; delta: 1."""
    dtype: jnp.dtype
    """The dtype of matmul operands."""

    @property
    def carried(self) -> int:
        """Matrices of a state."""
        return 2 if self.momentum else 1


def between(rule: Rule, numbers: Coefficients, columns: tuple[jax.Array, ...], marks: Marks | None):
    """Return G, and G' where that is not all 0: [C, C]; of the coefficients of one head."""
    if marks is None:
        shares = kept_between(numbers.retention, *columns, rule.dtype)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, shares.shape, axis) for axis in (0, 1))
        return shares, jnp.where(row < column, shares, 0.0)
    shares = moved_between(numbers.retention, numbers.momentum, *columns, marks.live, rule.dtype)
    length = shares.shape[0]
    if rule.chunk == length:
        return shares, None
    select = chunk_start(length, rule.chunk)
    return shares, dot(shares, select, MATMUL, rule.dtype) * (1.0 - marks.fresh)


def write(
    rule: Rule,
    carried: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    step: jax.Array,
    shares: Shares,
    before,
) -> jax.Array:
    """Return U transposed, [V, C].

    Args:
      rule: the rule.
      carried: of one head: the state, and the initial memory where documents restart from it.
      k: [K, C] float32.
      v: [V, C] float32.
      step: [1, C].
      shares: of one head.
      before: G', or None.
    """
    error = step * (v - _seen(carried, k, shares.error, rule.dtype))
    if before is None:
        return error
    system = step * before * dot(k, k, TRANSPOSED_MATMUL, rule.dtype)
    return solve(error, system, rule.chunk, rule.dtype)


def read(
    rule: Rule, carried, q: jax.Array, k: jax.Array, written: jax.Array, shares: Shares, after
) -> jax.Array:
    """Return the reads [V, C] of queries [K, C], of what a block starts with and of what it writes."""
    scores = after * dot(k, q, TRANSPOSED_MATMUL, rule.dtype)
    return dot(written, scores, MATMUL, rule.dtype) + _seen(carried, q, shares.read, rule.dtype)


def advance(rule: Rule, carried, k: jax.Array, written: jax.Array, shares: Shares) -> State:
    """Return the state after a block."""
    keys = jnp.concatenate([k * share for share in shares.write], axis=0)
    change = dot(keys, written, MATMUL_TRANSPOSED, rule.dtype)
    memory = change[: k.shape[0]]
    for matrix, kept in zip(carried, shares.kept, strict=False):
        memory += kept * matrix
    if not rule.momentum:
        return (memory,)
    return memory, change[k.shape[0] :] + shares.kept[-1] * carried[1]


def _seen(carried, x, shares, dtype):
    """Return what tokens [K, C] see of what is carried, [V, C]."""
    scaled = jnp.concatenate([x * share for share in shares], axis=0)
    return dot(jnp.concatenate(carried, axis=0), scaled, TRANSPOSED_MATMUL, dtype)


def block(rule: Rule, carried, q, k, v, numbers: Coefficients, columns, marks, shares: Shares):
    """Return the state after a block of one head, and its reads [V, C]."""
    after, before = between(rule, numbers, columns, marks)
    written = write(rule, carried, k, v, numbers.step, shares, before)
    return advance(rule, carried, k, written, shares), read(rule, carried, q, k, written, shares, after)


class Numbers:
    """A step's coefficients, of all heads of a group."""

    def __init__(self, rule: Rule, coefficients: Coefficients, marks_2C):
        self.all = jax.tree.map(lambda ref: ref[...], coefficients)
        self.marks = None if marks_2C is None else Marks(marks_2C[0:1], marks_2C[1:2])
        self._rule = rule
        factors = (self.all.retention, self.all.momentum) if rule.momentum else (self.all.retention,)
        self._columns = tuple(map(next_columns, factors))

    def shares(self, numbers: Coefficients) -> Shares:
        """Return `block_shares` of coefficients of all heads."""
        return block_shares(numbers, self.marks, self._rule.chunk)

    def columns(self, head: int) -> tuple[jax.Array, ...]:
        """Return a head's factors as `between` asks for them."""
        return tuple(column[:, head : head + 1] for column in self._columns)


def of_head(tree, head: int):
    """Return the rows of a head."""
    return jax.tree.map(lambda x: x[head : head + 1], tree)


def wide(ref, head: int) -> jax.Array:
    """Return a head's tokens in float32, so that their gradients are added up in it."""
    return ref[head].astype(jnp.float32)


def start_anew(state, initial) -> None:
    """Make a state the initial memory, without momentum."""
    state[0][...] = initial[...]
    for ref in state[1:]:
        ref[...] = jnp.zeros_like(ref)


def carried_by(state, initial, numbers: Coefficients, head: int) -> tuple[jax.Array, ...]:
    """Return what a head carries: its state, and the initial memory if documents restart from it."""
    more = () if numbers.restart is None else (initial[head],)
    return *(ref[head] for ref in state), *more

"""Which states the blocks of the TPU's kernel by unions read, and how its tokens are cut.

A block's states are a chain: a list tells of each number the first state from there on that the block reads.

Shapes: B batch, T tokens, H heads, N states, k choices, C tokens of a block, A steps of a head's tokens, L
numbers of a list, W words of 32 bits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels._platform import has_wide_units
from pallas_kernels._tpu_states import together

# Numbers of k choices come in whole multiples of SUBLANES; a bfloat16 register has 16 of them, ROWS, to which
# dims are padded.
SUBLANES, ROWS = 8, 16
# Tokens of a block: as many as a matrix unit is wide. More would read more states.
_LENGTH, _LENGTH_WIDE = 128, 256
# States a choice that a block of so many tokens reads where there are 32 to choose from, in a small model of
# text (docs/results.md); one more for twice as many.
_AGREED, _AGREED_OF = {_LENGTH: 6.0, _LENGTH_WIDE: 7.25}, 32
# Tokens of a step of the grid, at most.
_STEP = 1024
# Of VMEM, for states, their gradients, and the tokens of a step.
_SHARE = 0.85
_VMEM = 128 << 20
_WORD = 32
# Blocks of one axis, in SMEM, are whole multiples of this.
_NUMBERS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a read is cut."""

    length: int
    """Tokens of a block, a multiple of 128."""
    blocks: int
    """Blocks in a step of the grid."""
    steps: int
    """Grid steps over a head's tokens."""
    choices: int
    """States that a token reads."""
    states: int
    """How many there are."""

    @property
    def tokens(self) -> int:
        """In all, padding included."""
        return self.steps * self.blocks * self.length

    @property
    def chain(self) -> int:
        """Numbers of a block: how many states it reads, and for 0 to N + 1 the first from there on, or N."""
        return self.states + 3

    @property
    def numbers(self) -> int:
        """Numbers in the list of a step's blocks."""
        return _whole(self.blocks * self.chain, _NUMBERS)

    def expected_turns(self, many: int, few: int) -> tuple[float, float]:
        """Return in how many turns a block reads `many` states each, and in how many more `few`.

        If tokens agree as measured: where there are few states to choose from they read most of them, and
        halfway through the tokens half of all are there.
        """
        eligible = self.states / 2
        a_choice = _AGREED[self.length] + max(0.0, math.log2(eligible / _AGREED_OF))
        states = min(a_choice * self.choices, eligible)
        groups = states / few + (1 - 1 / few) / 2
        remain = (many // few - 1) / 2
        return max(groups - remain, 0.0) / (many // few), remain


def fit(q: jax.Array, choices: int, states: jax.Array, *, vmem: int | None) -> Plan | None:
    """Cut a read of matrix states so that its gradient fits into `vmem` bytes; None where it does not."""
    length = _LENGTH_WIDE if has_wide_units() else _LENGTH
    tokens, key_dim = q.shape[1], q.shape[3]
    count, value_dim = states.shape[1], states.shape[4]
    # Blocks of tokens and copied states are there twice, since the next are on their way.
    matrix = _whole(key_dim, ROWS) * _whole(value_dim, 128)
    matrices = matrix * (count * (q.dtype.itemsize + 4) + 2 * together(count) * 4)
    rows = 2 * ((2 * key_dim + value_dim) * q.dtype.itemsize + 3 * 4 * _whole(choices, SUBLANES))
    most = int(_SHARE * (vmem or _VMEM) - matrices) // rows
    if most < length:
        return None
    blocks = min(most, _STEP, _whole(tokens, length)) // length
    steps = -(-tokens // (blocks * length))
    return Plan(length=length, blocks=blocks, steps=steps, choices=choices, states=count)


def lists(indices: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Return the lists of all heads and steps one after the other [B H A L], int32, and their mean length.

    That is how many states a block reads, float32.
    """
    batch, tokens, heads, choices = indices.shape
    none = plan.states
    more = ((0, 0), (0, plan.tokens - tokens), (0, 0), (0, 0))
    index = jnp.pad(indices, more, constant_values=none)
    index_BHTkC = index.reshape(batch, -1, plan.length, heads, choices).transpose(0, 3, 1, 4, 2)
    # A bit a state: comparing with every state would be slow.
    words = jnp.arange(none // _WORD + 1, dtype=jnp.int32).reshape(1, 1, 1, -1, 1, 1)
    bit = jnp.left_shift(jnp.uint32(1), (index_BHTkC % _WORD).astype(jnp.uint32))[:, :, :, None]
    bit = jnp.where((index_BHTkC // _WORD)[:, :, :, None] == words, bit, jnp.uint32(0))
    union_BHTW = jax.lax.reduce(bit, jnp.uint32(0), jax.lax.bitwise_or, (4, 5))
    read = (union_BHTW[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32).reshape(1, 1, 1, 1, -1)) & 1
    read_BHTN = read.reshape(*read.shape[:3], -1)[..., :none] == 1
    number = jnp.where(read_BHTN, jax.lax.broadcasted_iota(jnp.int32, read_BHTN.shape, 3), none)
    following = jax.lax.cummin(number, axis=3, reverse=True)
    count = jnp.sum(read_BHTN, axis=3, keepdims=True, dtype=jnp.int32)
    end = jnp.full((*count.shape[:3], 2), none, jnp.int32)
    chain = jnp.concatenate([count, following, end], axis=3).reshape(batch * heads * plan.steps, -1)
    chain = jnp.pad(chain, ((0, 0), (0, plan.numbers - chain.shape[1])))
    return chain.reshape(-1), jnp.mean(count.astype(jnp.float32))


def _whole(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

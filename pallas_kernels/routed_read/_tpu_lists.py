"""The order in which the TPU's kernels visit pairs of a token and a choice: by the state that they read.

Tokens are cut into pieces, so that what a head's kernel needs of a piece is in VMEM as a whole: there any row
can be reached. A piece has a list of its own: where each state's pairs start, and then the pairs. A pair is
the number of its row among the rows of all pairs, choice by choice; its lowest bits are the token's.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, N states, k choices, P pieces, C tokens of a
piece, L numbers of a list.
"""

import dataclasses

import jax
import jax.numpy as jnp

_LANES = 128
# Blocks of one axis, in SMEM, are whole multiples of this.
_NUMBERS = 1024
# Pairs of a piece, at most: in SMEM a list is there twice, since the next is on its way.
_PAIRS = 1 << 16
# Of VMEM, for what has a row for each token or pair.
_SHARE = 0.8
_VMEM = 128 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a read is cut."""

    length: int
    """Tokens of a piece, a multiple of 128."""
    pieces: int
    """Pieces of the tokens."""
    choices: int
    """States that a token reads."""
    states: int
    """With padding, a multiple of `group`."""
    group: int
    """States that are copied together."""

    @property
    def bits(self) -> int:
        """Low bits of a pair's id that hold its token."""
        return max(self.length - 1, 1).bit_length()

    @property
    def rows(self) -> int:
        """For pairs, some of them for none."""
        return ((self.choices - 1) << self.bits) + self.length

    @property
    def heading(self) -> int:
        """Numbers of a list before its pairs: where each state's start, the end, the groups that are read."""
        return _whole(self.states + 2, _NUMBERS)

    @property
    def numbers(self) -> int:
        """Numbers in a list."""
        return self.heading + _whole(self.choices * self.length, _NUMBERS)

    def expected_blocks(self, rows: int) -> float:
        """Return how many blocks of `rows` a state's pairs fill, if all states are chosen equally often."""
        return self.choices * self.length / self.states / rows + 0.5  # half of the last one

    def expected_rows(self, rows: int, together: int) -> tuple[float, float]:
        """Return how many times `together` rows of a block are copied, and how many are copied alone."""
        blocks = self.expected_blocks(rows)
        filled = self.choices * self.length / self.states / blocks
        alone = min(filled, (together - 1) / 2 / blocks)  # of the last block of a state
        return (filled - alone) / together, alone


def fit(q: jax.Array, choices: int, states: jax.Array, *, group: int, vmem: int | None) -> Plan | None:
    """Cut a read of matrix states so that its gradient fits into `vmem` bytes; None where nothing fits."""
    tokens, key_dim = q.shape[1], q.shape[3]
    count, value_dim = states.shape[1], states.shape[4]
    key_dim, value_dim = _whole(key_dim, _LANES), _whole(value_dim, _LANES)
    # Rows of pairs and of tokens, in float32; blocks on their way in and out; gates and their gradients.
    forward = 4 * (choices * value_dim + key_dim) + 2 * q.dtype.itemsize * (key_dim + value_dim)
    backward = 4 * (choices * key_dim + value_dim) + 2 * q.dtype.itemsize * (2 * key_dim + value_dim)
    gates = 4 * 4 * _whole(choices, 8)
    # Groups of states in two places, of their gradients in three.
    groups = group * key_dim * value_dim * (2 * q.dtype.itemsize + 3 * 4)
    room = int(_SHARE * (vmem or _VMEM)) - groups
    most = min(room // (max(forward, backward) + gates), _PAIRS // choices)
    if most < _LANES:
        return None
    most = 1 << (most.bit_length() - 1)
    pieces = -(-tokens // most)
    length = _whole(-(-tokens // pieces), _LANES)
    plan = Plan(
        length=length,
        pieces=pieces,
        choices=choices,
        states=_whole(count, min(group, count)),
        group=min(group, count),
    )
    # A key is a state and a pair in 31 bits.
    return plan if (plan.states + 1) << _pair_bits(plan) < 1 << 31 else None


def lists(indices_BTHk: jax.Array, plan: Plan) -> jax.Array:
    """Return the lists of all heads and pieces one after the other [B H P L], int32."""
    batch, tokens, heads, choices = indices_BTHk.shape
    # A token that is not there reads the state after the last, which is never visited.
    more = ((0, 0), (0, plan.pieces * plan.length - tokens), (0, 0), (0, 0))
    state = jnp.pad(indices_BTHk, more, constant_values=plan.states)
    state = state.reshape(batch, plan.pieces, plan.length, heads, choices)
    state = state.transpose(0, 3, 1, 4, 2).reshape(-1, choices * plan.length)
    choice = jnp.arange(choices, dtype=jnp.int32)[:, None] << plan.bits
    pair = choice + jnp.arange(plan.length, dtype=jnp.int32)[None]
    keys = (state << _pair_bits(plan)) + pair.reshape(1, -1)
    pairs = jax.lax.sort(keys, dimension=1, is_stable=False) & ((1 << _pair_bits(plan)) - 1)
    end = jnp.cumsum(_count(state, plan.states), axis=1)
    start = jnp.pad(end, ((0, 0), (1, 0)))
    # Up to the first group that ends where all do, counted as if there were always one to read.
    ends = end[:, plan.group - 1 :: plan.group]
    groups = 1 + jnp.sum(ends < ends[:, -1:], axis=1, keepdims=True, dtype=jnp.int32)
    heading = jnp.concatenate([start, groups], axis=1)
    heading = jnp.pad(heading, ((0, 0), (0, plan.heading - heading.shape[1])))
    pairs = jnp.pad(pairs, ((0, 0), (0, plan.numbers - plan.heading - pairs.shape[1])))
    return jnp.concatenate([heading, pairs], axis=1).reshape(-1)


def _count(state: jax.Array, states: int) -> jax.Array:
    """Return how often each of `states` states is in the lists [G, P]: [G, N], int32.

    A product of the high and the low digits' one-hot numbers: comparing with every state would be slow.
    """
    low = 1 << (states.bit_length() // 2)
    high = -(-states // low)
    rows = (state[:, None] // low == jnp.arange(high, dtype=jnp.int32)[None, :, None]).astype(jnp.bfloat16)
    columns = (state[:, None] % low == jnp.arange(low, dtype=jnp.int32)[None, :, None]).astype(jnp.bfloat16)
    count = jnp.einsum("ghp,glp->ghl", rows, columns, preferred_element_type=jnp.float32)
    return count.reshape(state.shape[0], -1)[:, :states].astype(jnp.int32)


def _pair_bits(plan: Plan) -> int:
    return (plan.rows - 1).bit_length()


def _whole(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

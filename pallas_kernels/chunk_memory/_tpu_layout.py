"""How a linear memory is cut into the blocks that the TPU's kernels work on.

Tokens lie along lanes, so that a coefficient of a token is a number a lane; a segment is padded to whole
blocks with tokens that write nothing and forget nothing.

Shapes: B batch, T tokens (of all segments, padded), S segments, N blocks of a segment, C block, P groups of
heads, H heads of a group, K key dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._platform import cores, has_wide_units
from pallas_kernels._state import state_dtype

# Tokens of a block forward, there on wide matrix units, and backward.
_LENGTH, _LENGTH_WIDE, _LENGTH_BACKWARD = 128, 256, 256
# Heads that a step works on together: one computes where another waits.
_HEADS = 16
# The same for rules that write errors, whose steps are longer.
_HEADS_FORWARD, _HEADS_BACKWARD = 8, 4
# Of VMEM, of which a kernel has 16 MiB on any chip: what is kept there, and of it the states that a segment's
# blocks start from (backward), by the matrices of a state.
_BYTES = 10 << 20
_STARTS_BYTES = {1: 4 << 20, 2: 3 << 20}

SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The cut of a run into blocks."""

    tokens: int
    """Without padding."""
    segments: int
    segment: int
    """Tokens of a segment, without padding."""
    blocks: int
    """Blocks of a segment."""
    length: int
    """Tokens of a block."""
    heads: int
    """Heads of all groups."""
    group: int
    """Heads of a group."""
    independent: bool
    """Every segment starts anew."""
    documents: bool
    """The memory may start anew at any token."""

    @classmethod
    def fit(
        cls,
        q: jax.Array,
        value_dim: int,
        *,
        segment_length: int,
        independent: bool,
        documents: bool,
        backward: bool,
    ) -> "Cut":
        """Return the cut of a run of queries [B, T, H, K]."""
        _, tokens, heads, _ = q.shape
        segment = min(segment_length, tokens)
        forward = _LENGTH_WIDE if has_wide_units() else _LENGTH
        length = _LENGTH_BACKWARD if backward else forward
        if -segment % length >= _LENGTH:  # no padding that a smaller block does without
            length = _LENGTH
        blocks = -(-segment // length)
        tokens_bytes, state_bytes = _bytes(q, value_dim, length)
        if backward:
            head_bytes = 5 * tokens_bytes + (5 + blocks) * state_bytes
        else:
            head_bytes = 2 * tokens_bytes + 3 * state_bytes
        most = min(_HEADS, max(1, _BYTES // head_bytes))
        return cls(
            tokens=tokens,
            segments=-(-tokens // segment),
            segment=segment,
            blocks=blocks,
            length=length,
            heads=heads,
            group=_group(q, most),
            independent=independent,
            documents=documents,
        )

    @classmethod
    def of_errors(
        cls,
        q: jax.Array,
        value_dim: int,
        *,
        segment_length: int,
        independent: bool,
        documents: bool,
        carried: int,
        backward: bool,
    ) -> "Cut":
        """Return the cut of a run that writes errors, with so many matrices in a state."""
        _, tokens, heads, _ = q.shape
        segment = min(segment_length, tokens)
        blocks = -(-segment // _LENGTH)
        tokens_bytes, state_bytes = _bytes(q, value_dim, _LENGTH)
        if backward:
            head_bytes = 4 * tokens_bytes + (4 + (6 + blocks) * carried) * state_bytes
        else:
            head_bytes = 2 * tokens_bytes + (2 + 3 * carried) * state_bytes
        most = min(_HEADS_BACKWARD if backward else _HEADS_FORWARD, max(1, _BYTES // head_bytes))
        return cls(
            tokens=tokens,
            segments=-(-tokens // segment),
            segment=segment,
            blocks=blocks,
            length=_LENGTH,
            heads=heads,
            group=_group(q, most),
            independent=independent,
            documents=documents,
        )

    @staticmethod
    def most_tokens(key_dim: int, value_dim: int, carried: int = 1) -> int:
        """Return how long a segment may be, for the states that its blocks start from to be in VMEM."""
        # Its blocks may be as short as in the forward pass.
        return _STARTS_BYTES[carried] // (carried * key_dim * value_dim * 4) * _LENGTH

    def pad(self, x: jax.Array, fill: float = 0.0) -> jax.Array:
        """Pad [B, tokens, ...] to [B, T, ...], every segment for itself."""
        rest = ((0, 0),) * (x.ndim - 2)
        more = self.segments * self.segment - self.tokens
        x = jnp.pad(x, ((0, 0), (0, more), *rest), constant_values=fill)
        x = x.reshape(x.shape[0], self.segments, self.segment, *x.shape[2:])
        more = self.blocks * self.length - self.segment
        x = jnp.pad(x, ((0, 0), (0, 0), (0, more), *rest), constant_values=fill)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def unpad(self, x: jax.Array) -> jax.Array:
        """Undo `pad`."""
        batch, _, *rest = x.shape
        x = x.reshape(batch, self.segments, self.blocks * self.length, *rest)[:, :, : self.segment]
        return x.reshape(batch, -1, *rest)[:, : self.tokens]

    def within_blocks(self, x: jax.Array, reverse: bool = False) -> jax.Array:
        """Return the sums [B, T, ...] of x from the start of a token's block, or reversed from its end."""
        blocks = x.reshape(x.shape[0], -1, self.length, *x.shape[2:])
        return jax.lax.cumsum(blocks, axis=2, reverse=reverse).reshape(x.shape)

    def grouped(self, x_BTH: jax.Array) -> jax.Array:
        """Lay coefficients out as [B, P, H, T]."""
        batch, tokens, _ = x_BTH.shape
        return x_BTH.transpose(0, 2, 1).reshape(batch, -1, self.group, tokens)

    def ungrouped(self, x_BPHT: jax.Array) -> jax.Array:
        """Undo `grouped`."""
        batch, _, _, tokens = x_BPHT.shape
        return x_BPHT.reshape(batch, self.heads, tokens).transpose(0, 2, 1)

    def segment_of(self, block):
        """Return the segment of a block; a traced `//` would look the chip up, which may not be here."""
        return jax.lax.div(block, jnp.int32(self.blocks))

    def ends_segment(self, block):
        """Return whether a block is the last of its segment."""
        return jax.lax.rem(block, jnp.int32(self.blocks)) == self.blocks - 1

    def starts_anew(self, block):
        """Return whether the memory is empty before a block."""
        if self.independent:
            return jax.lax.rem(block, jnp.int32(self.blocks)) == 0
        return block == 0


class Specs:
    """Blocks in VMEM at a step of the grid (batch, groups of heads, steps); `block` tells a step's block."""

    def __init__(self, cut: Cut, block=lambda step: step):
        self._cut, self._block = cut, block

    def lanes(self, dim: int) -> pl.BlockSpec:
        """The block [H, dim, C] of an array [B, P H, dim, T]."""
        block = (None, self._cut.group, dim, self._cut.length)
        return pl.BlockSpec(block, lambda b, p, n: (b, p, 0, self._block(n)))

    def coefficients(self) -> pl.BlockSpec:
        """The block [H, C] of an array [B, P, H, T]."""
        block = (None, None, self._cut.group, self._cut.length)
        return pl.BlockSpec(block, lambda b, p, n: (b, p, 0, self._block(n)))

    def marks(self, rows: int = 1) -> pl.BlockSpec:
        """The block [rows, C] of an array [B, rows, T], the same for all heads."""
        return pl.BlockSpec((None, rows, self._cut.length), lambda b, p, n: (b, 0, self._block(n)))

    def initial(self, key_dim: int, value_dim: int) -> pl.BlockSpec:
        """The block [H, K, V] of an array [B, P H, K, V]."""
        return pl.BlockSpec((None, self._cut.group, key_dim, value_dim), lambda b, p, n: (b, p, 0, 0))

    def states(self, key_dim: int, value_dim: int, before: int = 0) -> pl.BlockSpec:
        """The segment's states [H, K, V], or those of the one `before`, of an array [B, S, P H, K, V]."""
        block = (None, None, self._cut.group, key_dim, value_dim)

        def index(b, p, n):
            segment = self._cut.segment_of(self._block(n))
            return b, jnp.maximum(segment - before, 0), p, 0, 0

        return pl.BlockSpec(block, index)


def valid_and_starts(
    q: jax.Array, document_ids: jax.Array | None, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return which tokens are written, and which of them begin a document, [B, T] bool."""
    batch, tokens = q.shape[:2]
    valid = jnp.ones((batch, tokens), bool)
    if lengths is not None:
        valid = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
    starts = jnp.zeros((batch, tokens), bool)
    if document_ids is not None:
        starts = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0))) & valid
    return valid, starts


def coefficient(q: jax.Array, x: jax.Array | None, neutral: float, where: jax.Array) -> jax.Array:
    """Return a coefficient [B, T, H], 1 if it is None, and neutral where a mask [B, T] is not."""
    dtype = state_dtype(q)
    x = jnp.full(q.shape[:3], 1.0, dtype) if x is None else x.astype(dtype)
    return jnp.where(where[..., None], x, jnp.asarray(neutral, dtype))


def _bytes(q, value_dim, length):
    """Return the bytes of keys and values of a block of a head, twice, and of a state."""
    key_dim = q.shape[3]
    tokens = 2 * length * (key_dim + value_dim) * q.dtype.itemsize
    return tokens, key_dim * -(-value_dim // 128) * 128 * 4


def _group(q, most):
    """Return the heads of a group: no core is to stand still while another works on a last, odd group."""
    batch, _, heads, _ = q.shape
    size = _largest_divisor(heads, most)
    odd = batch * (heads // size) % cores() != 0
    return size // 2 if odd and size % 2 == 0 else size


def _largest_divisor(count, most):
    return next(size for size in range(most, 0, -1) if count % size == 0)

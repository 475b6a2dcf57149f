"""How the MLP memory is laid out for the TPU's kernels, and what of it is in VMEM at a step of their grid.

A step (batch, heads, block) works on a block of chunks of some heads; blocks pass one after the other, and
the weights stay in VMEM. Heads lie side by side along lanes, as they come. Dims are padded to whole registers
with zeros: zero weights have zero gradients, and so stay what they are.

Shapes: B batch, S segments, M chunks in all, N chunks of a block, C chunk, H heads (of a step), K key dim
(and value dim), E hidden dim, R coefficients.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._branch import Branch
from pallas_kernels._chunks import Grid
from pallas_kernels._platform import vmem_bytes
from pallas_kernels.deep_memory._chunk import Tokens

_LANES = 128
# Rows of a bfloat16 register.
_SUBLANES = 16
# In VMEM: the states that the chunks of a block start from (backward), more where there is room, since each
# block's first is written to HBM; the state of the heads of a step.
_STARTS_BYTES = 2 << 20
_STATE_BYTES = 2 << 20
_MOST_CHUNKS = 8
# What a kernel has without being asked; how many states of one head the backward kernel takes at most, by
# their rows and the bytes of a token's number; how many more the compiler may use where there is room.
_VMEM_BYTES = 16 << 20
_STATES_IN_VMEM = {(1, 2): 18, (1, 4): 24, (2, 2): 16, (2, 4): 24}
_MORE_STATES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The cut of a run into blocks."""

    segments: int
    chunks: int
    """Chunks of a segment."""
    block: int
    """Chunks of a block."""
    chunk: int
    """Tokens of a chunk, padding included."""
    heads: int
    key_dim: int
    """Padding included."""
    hidden: int
    """Padding included."""
    rows: int
    """2 if there is a momentum, else 1."""
    itemsize: int
    """Bytes of a token's number."""
    branch: Branch
    """With the value dim, padding excluded."""
    documents: bool
    """The memory may start anew at any chunk, not just at a segment's first."""
    anchored: bool
    """Some row may end within a chunk."""

    @classmethod
    def fit(
        cls,
        grid: Grid,
        q: jax.Array,
        hidden: int,
        *,
        branch: Branch,
        momentum: bool,
        documents: bool,
        anchored: bool,
    ) -> "Cut":
        """Return the cut of a run of queries [B, T, H, K]."""
        _, _, heads, dim = q.shape
        key_dim, hidden = _up(dim, _LANES), _up(hidden, _LANES)
        rows = 2 if momentum else 1
        cut = cls(
            segments=grid.segments,
            chunks=grid.chunks,
            block=1,
            chunk=_up(grid.chunk, _SUBLANES),
            heads=heads,
            key_dim=key_dim,
            hidden=hidden,
            rows=rows,
            itemsize=q.dtype.itemsize,
            branch=dataclasses.replace(branch, dim=dim),
            documents=documents,
            anchored=anchored,
        )
        left = (vmem_bytes() or 0) - cut.vmem_bytes - _MORE_STATES * cut._state_bytes
        most = max(_STARTS_BYTES, left) // cut._start_bytes
        return dataclasses.replace(cut, block=_largest_divisor(grid.chunks, min(most, _MOST_CHUNKS)))

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        return self.segments * self.chunks // self.block

    @property
    def blocks_of_segment(self) -> int:
        """Blocks of a segment."""
        return self.chunks // self.block

    @property
    def heads_together(self) -> int:
        """Heads that one step of the forward kernel works on: one waits where the other computes."""
        return _largest_divisor(self.heads, _STATE_BYTES // self._state_bytes)

    @property
    def vmem_bytes(self) -> int:
        """Bytes of VMEM that the backward kernel needs, which needs more than the forward one."""
        starts = max(0, self.block * self._start_bytes - _STARTS_BYTES)
        return max(_VMEM_BYTES, _STATES_IN_VMEM[self.rows, self.itemsize] * self._state_bytes + starts)

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM that the compiler is given."""
        most = self.vmem_bytes + _MORE_STATES * self._state_bytes
        return min(most, vmem_bytes() or most)

    @property
    def _state_bytes(self) -> int:
        return 2 * self.rows * self.key_dim * self.hidden * 4

    @property
    def _start_bytes(self) -> int:
        return 2 * self.rows * self.key_dim * self.hidden * self.itemsize

    def tree(self, leaf):
        """Return a state all of whose leaves are `leaf`: (weights, momentum) of either layer."""
        return ((leaf,) * self.rows,) * 2

    def rows_of(self, x_BTHK: jax.Array, grid: Grid) -> jax.Array:
        """Lay padded tokens out as [B, M C, H K]."""
        batch, _, heads, dim = x_BTHK.shape
        x = x_BTHK.reshape(batch, -1, grid.chunk, heads, dim)
        more = ((0, 0), (0, 0), (0, self.chunk - grid.chunk), (0, 0), (0, self.key_dim - dim))
        return jnp.pad(x, more).reshape(batch, -1, heads * self.key_dim)

    def from_rows(self, x: jax.Array, grid: Grid, dim: int) -> jax.Array:
        """Undo `rows_of`."""
        x = x.reshape(x.shape[0], -1, self.chunk, self.heads, self.key_dim)
        return x[:, :, : grid.chunk, :, :dim].reshape(x.shape[0], -1, self.heads, dim)

    def coefficients_of(self, tokens: Tokens, grid: Grid) -> jax.Array:
        """Lay the coefficients out as [B, H, M, R, C]: step, retention and, with momentum, that and live."""
        named = [(tokens.step, 0.0), (tokens.retention, 1.0)]
        if self.rows == 2:
            live = jnp.ones_like(tokens.step)
            if tokens.live is not None:
                live = live * tokens.live
            named += [(tokens.momentum, 1.0), (live, 0.0)]

        def rows(x_BTH, neutral):
            x = x_BTH.reshape(x_BTH.shape[0], -1, grid.chunk, self.heads)
            more = ((0, 0), (0, 0), (0, self.chunk - grid.chunk), (0, 0))
            return jnp.pad(x, more, constant_values=neutral).transpose(0, 3, 1, 2)

        return jnp.stack([rows(x, neutral) for x, neutral in named], axis=3)

    def weights_of(self, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Pad (W_in [..., K, E], W_out [..., E, K]), and transpose the second."""

        def pad(leaf):
            more = ((0, self.key_dim - leaf.shape[-2]), (0, self.hidden - leaf.shape[-1]))
            return jnp.pad(leaf, ((0, 0),) * (leaf.ndim - 2) + more)

        w_in, w_out = weights
        return pad(w_in), pad(w_out.swapaxes(-1, -2))


class Specs:
    """Blocks in VMEM at a step of the grid (batch, heads, blocks), which may run from the last block."""

    def __init__(self, cut: Cut, heads: int, *, reverse: bool = False):
        self._cut, self._heads, self._reverse = cut, heads, reverse

    def _block(self, n):
        return self._cut.blocks - 1 - n if self._reverse else n

    def tokens(self) -> pl.BlockSpec:
        """The block [N C, H K] of an array [B, M C, H K]."""
        cut = self._cut
        block = (None, cut.block * cut.chunk, self._heads * cut.key_dim)
        return pl.BlockSpec(block, lambda b, h, n, *_: (b, self._block(n), h))

    def coefficients(self) -> pl.BlockSpec:
        """The block [H, N, R, C] of an array [B, H, M, R, C]."""
        cut = self._cut
        block = (None, self._heads, cut.block, 2 * cut.rows, cut.chunk)
        return pl.BlockSpec(block, lambda b, h, n, *_: (b, h, self._block(n), 0, 0))

    def states(self, rows: int, columns: int) -> pl.BlockSpec:
        """The segment's block [H, rows, columns] of an array [B, S, H, rows, columns]."""
        block = (None, None, self._heads, rows, columns)
        per_segment = self._cut.blocks_of_segment

        def index(b, h, n, *_):
            # A traced `//` looks the chip up, which may not be here.
            return b, jax.lax.div(self._block(n), jnp.int32(per_segment)), h, 0, 0

        return pl.BlockSpec(block, index)

    def kept(self) -> pl.BlockSpec:
        """The block [H, K, E] of an array [B, blocks, H, K, E]."""
        block = (None, None, self._heads, self._cut.key_dim, self._cut.hidden)
        return pl.BlockSpec(block, lambda b, h, n, *_: (b, self._block(n), h, 0, 0))

    def initial(self) -> pl.BlockSpec:
        """The block [H, K, E] of an array [B, H, K, E]."""
        block = (None, self._heads, self._cut.key_dim, self._cut.hidden)
        return pl.BlockSpec(block, lambda b, h, n, *_: (b, h, 0, 0))

    @staticmethod
    def in_place() -> pl.BlockSpec:
        """What is copied by hand, when it is needed."""
        return pl.BlockSpec(memory_space=pl.ANY)


def segment_ends(cut: Cut, block):
    """Whether a block is the last of its segment."""
    return jax.lax.rem(block + 1, jnp.int32(cut.blocks_of_segment)) == 0


def scratch(cut: Cut, heads: int):
    """Return a leaf of the state of the heads of a step."""
    return pltpu.VMEM((heads, cut.key_dim, cut.hidden), jnp.float32)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _largest_divisor(count: int, most: int) -> int:
    return next(size for size in range(max(1, min(count, most)), 0, -1) if count % size == 0)

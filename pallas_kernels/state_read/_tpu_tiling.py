"""How a read is cut into the blocks that the TPU's kernels work on, shared by forward and backward.

Tokens lie along lanes: a gate is then one number a lane, and weighing by it is a broadcast along sublanes,
which is free. Tokens are cut into pieces of blocks, states into groups (what lies side by side for a matrix
product) and groups into tiles (what is in VMEM at a time).

Shapes: B batch, T tokens, P pieces, C tokens of a block, H heads, K key dim, V value dim, N states,
S groups of states, G states of a group.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._platform import vmem_bytes

_LANES = 128
# A bfloat16 register has 16 sublanes: dims are padded to that, so that groups of states lie side by side.
_SUBLANES = 16
# In VMEM: states of a tile, loaded and (backward) written, twice since the next are on their way; queries. Of
# a large VMEM some of it, since what is cut passes once for each cut: states for each block of tokens, gates
# and queries for each tile, states' gradients for each piece.
_STATES_BYTES, _STATES_SHARE = 4 << 20, 1 / 8
_QUERIES_BYTES, _QUERIES_SHARE = 4 << 20, 1 / 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """The cut of a read; its methods take numbers or traced scalars, and are used in index maps."""

    length: int
    """Tokens of a block."""
    blocks: int
    """Blocks of a piece of the tokens."""
    pieces: int
    """Pieces of the tokens."""
    group: int
    """States of a group."""
    tile: int
    """Groups of a tile."""
    tiles: int
    """Tiles of groups."""
    states: int
    """States without padding."""
    segment_length: int | None
    """A token t reads only states before t // segment_length; None: all."""

    @property
    def tokens(self) -> int:
        """Tokens in all, padding included."""
        return self.pieces * self.blocks * self.length

    @property
    def groups(self) -> int:
        """Groups in all, padding included."""
        return self.tiles * self.tile

    def groups_read(self, block, stop: int | None = None):
        """Return how many groups, counted from the first, some token of a block reads.

        Of its first `stop` tokens, if that is given.
        """
        groups = pl.cdiv(self.states, self.group)
        if self.segment_length is None:
            return groups
        last = block * self.length + (stop or self.length) - 1
        return jnp.minimum(groups, _ceil(_floor(last, self.segment_length), self.group))

    def groups_read_of(self, block, tile, stop: int | None = None):
        """Return how many groups of a tile, counted from its first, `groups_read` are."""
        if self.tiles == 1:
            return self.groups_read(block, stop)
        if self.segment_length is None and pl.cdiv(self.states, self.group) == self.groups:
            return self.tile
        return jnp.clip(self.groups_read(block, stop) - tile * self.tile, 0, self.tile)

    def tile_read(self, block, tile):
        """Return the tile, or the last that the block reads: the tiles after it are then not loaded."""
        if self.segment_length is None or self.tiles == 1:
            return tile
        return jnp.minimum(tile, jnp.maximum(_ceil(self.groups_read(block), self.tile) - 1, 0))

    def block_reading(self, piece, tile, block):
        """Return the block of a piece, or the first that reads of the tile: those before are not loaded."""
        start = piece * self.blocks
        if self.segment_length is None:
            return start + block
        first_token = (tile * self.tile * self.group + 1) * self.segment_length
        first = jnp.clip(_floor(first_token, self.length) - start, 0, self.blocks - 1)
        return start + jnp.maximum(block, first)


def room_for_states() -> int:
    """Return how many bytes of VMEM the states of a tile may take."""
    return max(_STATES_BYTES, int(_STATES_SHARE * (vmem_bytes() or 0)))


def room_for_queries() -> int:
    """Return how many bytes of VMEM the sums of a piece's queries may take."""
    return max(_QUERIES_BYTES, int(_QUERIES_SHARE * (vmem_bytes() or 0)))


def parameters(*semantics: Any) -> pltpu.CompilerParams:
    """Return a kernel's parameters, which allow it nearly all of VMEM; `semantics` are of the grid's axes."""
    vmem = vmem_bytes()
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=None if vmem is None else int(0.95 * vmem)
    )


def fit(
    *,
    tokens: int,
    states: int,
    segment_length: int | None,
    group: int,
    most: float,
    length: int,
    piece: int | None = None,
) -> Tiling:
    """Return the cut of a read.

    Args:
      tokens: how many there are.
      states: how many there are.
      segment_length: see `Tiling`.
      group: most states of a group.
      most: most states of a tile; a tile has one group at least.
      length: most tokens of a block, a multiple of 128.
      piece: most tokens of a piece; a piece has one block at least. None: there is one piece.
    """
    group = min(group, states)
    groups = pl.cdiv(states, group)
    fewest = pl.cdiv(groups, max(1, int(most // group)))
    # Gates and states are padded to whole tiles, which copies them: rather a few tiles more.
    tiles = next((n for n in range(fewest, min(2 * fewest, groups + 1)) if groups % n == 0), fewest)
    blocks = pl.cdiv(tokens, length)
    pieces = 1 if piece is None else pl.cdiv(blocks, max(1, piece // length))
    blocks = pl.cdiv(blocks, pieces)
    return Tiling(
        length=pl.cdiv(tokens, pieces * blocks * _LANES) * _LANES,
        blocks=blocks,
        pieces=pieces,
        group=group,
        tile=pl.cdiv(groups, tiles),
        tiles=tiles,
        states=states,
        segment_length=segment_length,
    )


def for_groups(count, visit, together: int) -> None:
    """Call visit(first group, how many) over `count` groups: `together` in one go, then fewer.

    What is visited together is straight code, at whose end the matrix unit runs empty.
    """
    if isinstance(count, int) and count <= together:
        visit(0, count)
        return
    size = 1 << (together.bit_length() - 1)
    jax.lax.fori_loop(0, _floor(count, size), lambda turn, _: visit(turn * size, size), None)
    while size > 1:
        size //= 2
        first = _floor(count, 2 * size) * (2 * size)
        pl.when(count - first >= size)(functools.partial(visit, first, size))


def _floor(a, b: int):
    # Of a number or traced scalar, not negative. A traced `//` looks the chip up, which may not be here.
    return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def _ceil(a, b: int):
    return _floor(a + (b - 1), b)


def gate_groups(gates_BTHN: jax.Array, tiling: Tiling) -> jax.Array:
    """Lay gates out as [B, H, S, G, T], padded with zeros."""
    batch, length, heads, states = gates_BTHN.shape
    count = tiling.groups * tiling.group
    gates = jnp.pad(gates_BTHN, ((0, 0), (0, tiling.tokens - length), (0, 0), (0, count - states)))
    return gates.transpose(0, 2, 3, 1).reshape(batch, heads, tiling.groups, tiling.group, tiling.tokens)


def from_gate_groups(gates_BHSGT: jax.Array, tokens: int, states: int) -> jax.Array:
    """Undo `gate_groups`."""
    batch, heads, groups, group, length = gates_BHSGT.shape
    gates = gates_BHSGT.reshape(batch, heads, groups * group, length).transpose(0, 3, 1, 2)
    return gates[:, :tokens, :, :states]


def pad_states(leaf_BNHKV: jax.Array, tiling: Tiling) -> jax.Array:
    """Pad states to whole tiles, and their dims to whole registers, with zeros."""
    _, states, _, rows, columns = leaf_BNHKV.shape
    more = tiling.groups * tiling.group - states
    return jnp.pad(leaf_BNHKV, ((0, 0), (0, more), (0, 0), (0, -rows % _SUBLANES), (0, -columns % _SUBLANES)))


def beside(key_dim: int, tiling: Tiling) -> int:
    """Return how many states of a group XLA has to lay side by side, for the rest to be whole registers."""
    return 1 if key_dim % _LANES == 0 else tiling.group


def side_by_side(leaf_BNHKV: jax.Array, count: int) -> jax.Array:
    """Transpose padded states and lay each `count` of them side by side: [B, H, N / count, V, count K]."""
    batch, states, heads, rows, columns = leaf_BNHKV.shape
    leaf = leaf_BNHKV.reshape(batch, states // count, count, heads, rows, columns)
    return leaf.transpose(0, 3, 1, 5, 2, 4).reshape(batch, heads, states // count, columns, count * rows)


class ForwardSpecs:
    """What is in VMEM at a step of the grid (batch, heads, blocks, tiles): the sum over states is inmost."""

    def __init__(self, tiling: Tiling):
        self._tiling = tiling

    def tokens(self, dim: int) -> pl.BlockSpec:
        """The block [K, C] of an array [B, H, K, T]."""
        return pl.BlockSpec((None, None, dim, self._tiling.length), lambda b, h, t, n: (b, h, 0, t))

    def gates(self) -> pl.BlockSpec:
        """The block [S, G, C] of an array [B, H, S, G, T]."""
        cut = self._tiling
        block = (None, None, cut.tile, cut.group, cut.length)
        return pl.BlockSpec(block, lambda b, h, t, n: (b, h, cut.tile_read(t, n), 0, t))

    def states(self, rows: int, columns: int, count: int) -> pl.BlockSpec:
        """A tile's states [N / count, rows, columns] of an array [B, H, N / count, rows, columns]."""
        cut = self._tiling
        block = (None, None, cut.tile * cut.group // count, rows, columns)
        return pl.BlockSpec(block, lambda b, h, t, n: (b, h, cut.tile_read(t, n), 0, 0))

    def whole_states(self, rows: int, columns: int) -> pl.BlockSpec:
        """A tile's states [N, rows, columns] of an array [B, N, H, rows, columns]."""
        cut = self._tiling
        block = (None, cut.tile * cut.group, None, rows, columns)
        return pl.BlockSpec(block, lambda b, h, t, n: (b, cut.tile_read(t, n), h, 0, 0))


class BackwardSpecs:
    """The same at a step of the grid (batch, heads, pieces, tiles, blocks): the sum over tokens is inmost."""

    def __init__(self, tiling: Tiling):
        self._tiling = tiling

    def tokens(self, dim: int) -> pl.BlockSpec:
        """The block [K, C] of an array [B, H, K, T]."""
        cut = self._tiling
        block = (None, None, dim, cut.length)
        return pl.BlockSpec(block, lambda b, h, p, n, t: (b, h, 0, cut.block_reading(p, n, t)))

    def gates(self) -> pl.BlockSpec:
        """The block [S, G, C] of an array [B, H, S, G, T]."""
        cut = self._tiling
        block = (None, None, cut.tile, cut.group, cut.length)
        return pl.BlockSpec(block, lambda b, h, p, n, t: (b, h, n, 0, cut.block_reading(p, n, t)))

    def states(self, rows: int, columns: int) -> pl.BlockSpec:
        """A tile's states [N, rows, columns] of an array [B, N, H, rows, columns]."""
        cut = self._tiling
        block = (None, cut.tile * cut.group, None, rows, columns)
        return pl.BlockSpec(block, lambda b, h, p, n, t: (b, n, h, 0, 0))

    def tokens_bar(self, dim: int) -> pl.BlockSpec:
        """The block [K, C] of an array [B, H, K, T]; it leaves, whole, when the last tile has passed."""
        cut = self._tiling
        block = (None, None, dim, cut.length)

        def index(b, h, p, n, t):
            return b, h, 0, p * cut.blocks + jnp.where(n == cut.tiles - 1, t, 0)

        return pl.BlockSpec(block, index)

    def gates_bar(self) -> pl.BlockSpec:
        """The block [S, G, C] of an array [B, H, S, G, T], over all blocks."""
        cut = self._tiling
        block = (None, None, cut.tile, cut.group, cut.length)
        return pl.BlockSpec(block, lambda b, h, p, n, t: (b, h, n, 0, p * cut.blocks + t))

    def states_bar(self, rows: int, columns: int) -> pl.BlockSpec:
        """A tile's states [N, rows, columns] of an array [P, B, N, H, rows, columns]."""
        cut = self._tiling
        block = (None, None, cut.tile * cut.group, None, rows, columns)
        return pl.BlockSpec(block, lambda b, h, p, n, t: (p, b, n, h, 0, 0))

"""The convolution as a Pallas kernel for TPUs, forward and backward.

Maps leave tokens along sublanes, and memories take them along lanes: the kernels read the one and write the
other, so that nothing between the two is copied. What they compute stays in VMEM, in float32.

Forward, blocks of a row's tokens come one after the other; the last tokens of each wait in VMEM for the next.
Backward they come from the last to the first, and what waits are gradients of the first tokens of each.

Shapes: B batch, T tokens, C tokens of a block, D channels, E channels of a block, P blocks of channels,
W width, H heads, K channels of a head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_EPSILON = 1e-6
_LANES = 128
# Taps that a token sees besides itself lie in one register, next to a block.
_HALO = 8
# Rows of a block that a block before it is read from: of a bfloat16 register, and no fewer.
_BEFORE = 16
_TOKENS = 256
_CHANNELS = 512
# Columns of what tells of each token how many before and after it are of its document.
_BEHIND, _AHEAD = 0, 1


def has_kernel(x: jax.Array, taps: jax.Array, heads: int) -> bool:
    """Whether there is a kernel for these."""
    channels = x.shape[2]
    return taps.shape[0] <= _HALO and not channels % _LANES and not channels // heads % 8


def short_convolution(
    x: jax.Array, taps: jax.Array, *, heads: int, normalize: bool, document_ids: jax.Array | None
) -> jax.Array:
    """See `pallas_kernels.short_convolution.short_convolution`; shapes as there.

    Off a TPU it runs in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`.
    """
    batch, tokens, _ = x.shape
    length = min(_TOKENS, tokens + -tokens % _LANES)
    more = -tokens % length
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
    if document_ids is None:
        document_ids = jnp.zeros((batch, tokens), jnp.int32)
    # What is padded continues the last document; its gradient is zero.
    document_ids = jnp.pad(document_ids, ((0, 0), (0, more)), mode="edge")
    seen = _seen(document_ids, taps.shape[0] - 1)
    y_BHKT = _convolution(x, taps.astype(jnp.float32), seen, heads, normalize, length)
    return y_BHKT.transpose(0, 3, 1, 2)[:, :tokens]


def _seen(document_ids: jax.Array, most: int) -> jax.Array:
    """How many tokens right before and right after each are of its document, up to `most`: [B, T, 2]."""

    def count(ids: jax.Array) -> jax.Array:
        found = jnp.zeros(ids.shape, jnp.int32)
        for distance in range(1, most + 1):
            same = (ids[:, distance:] == ids[:, :-distance]).astype(jnp.int32)
            found += jnp.pad(same, ((0, 0), (distance, 0)))
        return found

    return jnp.stack([count(document_ids), count(document_ids[:, ::-1])[:, ::-1]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _convolution(x, taps, seen, heads, normalize, length):
    batch, tokens, channels = x.shape
    cut = _Cut(channels, heads, length, tokens)
    y_BDT = pl.pallas_call(
        functools.partial(_forward_kernel, cut, normalize),
        grid=(batch, cut.blocks, cut.parts),
        in_specs=[cut.tokens(), cut.taps(taps.shape[0]), cut.seen()],
        out_specs=cut.lanes(),
        out_shape=jax.ShapeDtypeStruct((batch, channels, tokens), x.dtype),
        scratch_shapes=[
            pltpu.VMEM((cut.parts, _HALO, cut.channels), jnp.float32),
            pltpu.VMEM((_HALO + length, cut.channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="short_convolution",
    )(x, taps, seen)
    return y_BDT.reshape(batch, heads, channels // heads, tokens)


def _forward(x, taps, seen, heads, normalize, length):
    return _convolution(x, taps, seen, heads, normalize, length), (x, taps, seen)


def _backward(heads, normalize, length, residuals, bar_BHKT):
    x, taps, seen = residuals
    batch, tokens, channels = x.shape
    cut = _Cut(channels, heads, length, tokens, is_reversed=True)
    x_bar, taps_bar = pl.pallas_call(
        functools.partial(_backward_kernel, cut, normalize, taps.shape[0]),
        grid=(batch, cut.blocks, cut.parts),
        in_specs=[cut.tokens(), cut.before(), cut.taps(taps.shape[0]), cut.seen(), cut.lanes()],
        out_specs=[cut.tokens(), cut.sums()],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, cut.parts, _HALO, cut.channels), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((cut.parts, _HALO, cut.channels), jnp.float32),
            pltpu.VMEM((_HALO + length, cut.channels), jnp.float32),
            pltpu.VMEM((length + _HALO, cut.channels), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="short_convolution_backward",
    )(x, x, taps, seen, bar_BHKT.reshape(batch, channels, tokens))
    taps_bar = jnp.sum(taps_bar, axis=0).transpose(1, 0, 2).reshape(_HALO, channels)[: taps.shape[0]]
    return x_bar, taps_bar, None


_convolution.defvjp(_forward, _backward)


class _Cut:
    """Blocks of tokens and channels, and where each of an operand lies: a channel block has whole heads."""

    def __init__(self, channels: int, heads: int, length: int, tokens: int, *, is_reversed: bool = False):
        unit = math.lcm(channels // heads, _LANES)
        self.channels = channels
        if not channels % unit:
            most = max(1, _CHANNELS // unit)
            units = channels // unit
            self.channels = unit * max(n for n in range(1, most + 1) if not units % n)
        self.parts = channels // self.channels
        self.head_dim = channels // heads
        self.length = length
        self.blocks = tokens // length
        self._is_reversed = is_reversed

    def _place(self, block: Any) -> Any:
        return self.blocks - 1 - block if self._is_reversed else block

    def tokens(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.length, self.channels), lambda b, t, d: (b, self._place(t), d))

    def before(self) -> pl.BlockSpec:
        """The last tokens of the block before; of the first one, any."""
        each = self.length // _BEFORE
        return pl.BlockSpec(
            (None, _BEFORE, self.channels),
            lambda b, t, d: (b, jnp.maximum(self._place(t) * each - 1, 0), d),
        )

    def lanes(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.channels, self.length), lambda b, t, d: (b, d, self._place(t)))

    def taps(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((width, self.channels), lambda b, t, d: (0, d))

    def seen(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.length, 2), lambda b, t, d: (b, self._place(t), 0))

    def sums(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.parts, _HALO, self.channels), lambda b, t, d: (b, 0, 0, 0))


def _forward_kernel(cut: _Cut, normalize: bool, x_CE, taps_WE, seen_C2, y_EC, last_PxE, row_xE):
    part = pl.program_id(2)

    @pl.when(pl.program_id(1) == 0)
    def _():
        last_PxE[part] = jnp.zeros_like(row_xE[:_HALO])

    row_xE[:_HALO] = last_PxE[part]
    row_xE[_HALO:] = x_CE[...].astype(jnp.float32)
    last_PxE[part] = row_xE[cut.length :]
    z_CE, _ = _sum(cut, row_xE, taps_WE, seen_C2)
    s_EC = (z_CE * jax.nn.sigmoid(z_CE)).T
    if normalize:
        s_EC *= _inverse_length(cut, s_EC)
    y_EC[...] = s_EC.astype(y_EC.dtype)


def _backward_kernel(
    cut: _Cut,
    normalize: bool,
    width: int,
    x_CE,
    before_xE,
    taps_WE,
    seen_C2,
    bar_EC,
    x_bar_CE,
    taps_bar_PxE,
    next_PxE,
    row_xE,
    bars_xE,
):
    step, part = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        next_PxE[part] = jnp.zeros_like(row_xE[:_HALO])
        taps_bar_PxE[part] = jnp.zeros_like(row_xE[:_HALO])

    # Nothing before a row's first token is ever seen: `seen` says so.
    row_xE[:_HALO] = before_xE[_BEFORE - _HALO :].astype(jnp.float32)
    row_xE[_HALO:] = x_CE[...].astype(jnp.float32)
    z_CE, shifted = _sum(cut, row_xE, taps_WE, seen_C2)
    gate_CE = jax.nn.sigmoid(z_CE)
    s_CE = z_CE * gate_CE
    bar = bar_EC[...].astype(jnp.float32)
    if normalize:
        s_EC = s_CE.T
        inverse = _inverse_length(cut, s_EC)
        along = _per_head(cut, s_EC * bar) * inverse * inverse
        bar = inverse * (bar - s_EC * along)
    z_bar_CE = bar.T * (gate_CE + s_CE * (1 - gate_CE))
    bars_xE[: cut.length] = z_bar_CE
    bars_xE[cut.length :] = next_PxE[part]
    next_PxE[part] = bars_xE[:_HALO]

    x_bar = taps_WE[0:1] * z_bar_CE
    for distance in range(1, width):
        later = bars_xE[distance : distance + cut.length]
        within = seen_C2[:, _AHEAD : _AHEAD + 1] >= distance
        x_bar += taps_WE[distance : distance + 1] * jnp.where(within, later, jnp.zeros_like(later))
    x_bar_CE[...] = x_bar.astype(x_bar_CE.dtype)
    sums = [jnp.sum(z_bar_CE * x, axis=0, keepdims=True) for x in shifted]
    sums += [jnp.zeros_like(sums[0])] * (_HALO - width)
    taps_bar_PxE[part] += jnp.concatenate(sums, axis=0)


def _sum(cut: _Cut, row_xE, taps_WE, seen_C2) -> tuple[jax.Array, list[jax.Array]]:
    """The convolution of a block, and the tokens that each tap weighs."""
    shifted = []
    total = jnp.zeros((cut.length, cut.channels), jnp.float32)
    for distance in range(taps_WE.shape[0]):
        earlier = row_xE[_HALO - distance : _HALO - distance + cut.length]
        if distance:
            within = seen_C2[:, _BEHIND : _BEHIND + 1] >= distance
            earlier = jnp.where(within, earlier, jnp.zeros_like(earlier))
        shifted.append(earlier)
        total += taps_WE[distance : distance + 1] * earlier
    return total, shifted


def _per_head(cut: _Cut, x_EC: jax.Array) -> jax.Array:
    """Sums over each head's channels, at all of them."""
    heads = x_EC.reshape(-1, cut.head_dim, cut.length)
    return jnp.broadcast_to(jnp.sum(heads, axis=1, keepdims=True), heads.shape).reshape(x_EC.shape)


def _inverse_length(cut: _Cut, s_EC: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(_per_head(cut, s_EC * s_EC) + _EPSILON)

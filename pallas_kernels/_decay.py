"""Products of retentions between pairs of tokens.

C tokens of a chunk (or the chunks of a segment).
"""

import jax
import jax.numpy as jnp


def decay_matrix(factor: jax.Array) -> jax.Array:
    """Return D [..., C, C] with D_ij = factor_{j+1} ... factor_i for i >= j, and 0 above the diagonal.

    Blocks of doubling size: nothing is divided or subtracted, so that a factor may be tiny or 0, and the
    gradient is exact there too. (The usual exp(c_i - c_j) of cumulative logarithms has neither property.)

    Args:
      factor: [..., C].
    """
    count = factor.shape[-1]
    size = 1 << (count - 1).bit_length()
    padding = [(0, 0)] * (factor.ndim - 1) + [(0, size - count)]
    # From the start of its block through token i; the matrix within each block.
    through = jnp.pad(factor, padding, constant_values=1)[..., None]
    blocks = jnp.ones_like(through)[..., None]
    while through.shape[-2] > 1:
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        across = through[..., 1::2, :, None] * first[..., -1:, :]
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([upper, jnp.concatenate([across, second], axis=-1)], axis=-2)
        head, tail = through[..., 0::2, :], through[..., 1::2, :]
        through = jnp.concatenate([head, head[..., -1:] * tail], axis=-1)
    return blocks[..., 0, :count, :count]

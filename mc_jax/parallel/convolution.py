"""The short convolution on a mesh: each device runs its own rows, tokens and channels.

Devices that share a row bring the few tokens before their first from the one before.

Shapes: B batch, T tokens, D channels, W width, H heads, K channels of a head.
"""

import jax
import jax.numpy as jnp

from mc_jax.parallel.rules import RULES, is_sharded, size_of, whole_spec
from pallas_kernels import short_convolution


def convolve(
    x: jax.Array, taps: jax.Array, *, heads: int, normalize: bool, document_ids: jax.Array | None
) -> jax.Array:
    """`short_convolution` of x [B, T, D]: [B, T, H, K].

    It is mapped over the mesh by hand: the compiler cannot divide a kernel.

    Args:
      x: as there, like all that follows.
      taps: [W, D].
      heads: H.
      normalize: scale heads to length 1.
      document_ids: [B, T].
    """

    def run(x: jax.Array, taps: jax.Array, document_ids: jax.Array | None) -> jax.Array:
        here = heads * x.shape[2] // channels
        return short_convolution(x, taps, heads=here, normalize=normalize, document_ids=document_ids)

    (axis,) = RULES.tokens
    channels, halo, devices = x.shape[2], taps.shape[0] - 1, size_of("tokens")
    if not is_sharded():
        return run(x, taps, document_ids)

    def run_part(x: jax.Array, taps: jax.Array, document_ids: jax.Array | None) -> jax.Array:
        if devices == 1 or not halo:
            return run(x, taps, document_ids)
        pairs = [(place, place + 1) for place in range(devices - 1)]
        # Before a row's first token there are zeros.
        tokens = x, document_ids
        before = jax.tree.map(lambda one: jax.lax.ppermute(one[:, -halo:], axis, pairs), tokens)
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), before, tokens)
        return run(whole[0], taps, whole[1])[:, halo:]

    # All axes are named, those of one device too: over an axis that is not, gradients would be summed.
    per_token = whole_spec("batch", "tokens", "heads")
    return jax.shard_map(
        run_part,
        in_specs=(per_token, whole_spec(None, "heads"), whole_spec("batch", "tokens")),
        out_specs=per_token,
        check_vma=False,  # results of kernels do not tell over which axes they vary
    )(x, taps, document_ids)

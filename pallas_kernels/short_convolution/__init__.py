"""What makes queries, keys and values of linear maps' results: a short causal convolution, SiLU, unit length.

B batch, T tokens, D channels, W width, H heads, K channels of a head.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._platform import on_tpu
from pallas_kernels.short_convolution import reference, tpu, xla
from pallas_kernels.short_convolution.xla import unit_length

__all__ = ["short_convolution", "unit_length"]

_IMPLEMENTATIONS = {
    "reference": reference.short_convolution,
    "tpu": tpu.short_convolution,
    "xla": xla.short_convolution,
}


def short_convolution(
    x: jax.Array,
    taps: jax.Array,
    *,
    heads: int,
    normalize: bool,
    document_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """silu(sum_j taps[j] * x_{t-j}), channel by channel, in heads and there, if wished, of length 1.

    The sum is over tokens of t's own document. Length 1 is s / sqrt(|s|^2 + 1e-6): finite gradients at 0. It
    is what MC section 5 and Gated DeltaNet (arXiv:2412.06464) put between maps and memories.

    Args:
      x: [B, T, D].
      taps: [W, D], of any dtype; the first one weighs the token itself.
      heads: H, which divides D.
      normalize: scale each head's K channels to length 1.
      document_ids: [B, T] integers that do not decrease along a row; None: a row is one document.
      implementation: "tpu", which is float32 and bfloat16, for D and K that are multiples of 128 and 8, and
        not split over devices by itself (it belongs in a `jax.shard_map` over batch and heads), "xla" or
        "reference"; None picks the best for the platform of the mesh that is set (`jax.set_mesh`), or else
        of the default device.

    Returns:
      [B, T, H, K] of x's dtype.

    Raises:
      ValueError: shapes that do not fit together, or an implementation that is unknown or has no kernel.
    """
    if x.ndim != 3 or taps.ndim != 2 or taps.shape[0] < 1 or taps.shape[1] != x.shape[2]:
        raise ValueError(
            f"taps {taps.shape} do not fit x {x.shape}; give [width, D] with width 1 or more, and x [B, T, D]"
        )
    if heads < 1 or x.shape[2] % heads:
        raise ValueError(f"{heads} heads do not divide the {x.shape[2]} channels of x; choose a divisor")
    if document_ids is not None and document_ids.shape != x.shape[:2]:
        raise ValueError(f"document_ids {document_ids.shape} do not fit x {x.shape}; give {x.shape[:2]}")
    fits = tpu.has_kernel(x, taps, heads)
    if implementation is None:
        implementation = "tpu" if fits and on_tpu(x) else "xla"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; choose one of {names}, or None for the best")
    if implementation == "tpu" and not fits:
        raise ValueError(
            f"there is no kernel for {taps.shape[0]} taps on {x.shape[2]} channels in {heads} heads: "
            "it takes 8 taps at most, channels in multiples of 128 and of 8 a head; choose 'xla'"
        )
    if not x.size:
        return jnp.zeros((*x.shape[:2], heads, x.shape[2] // heads), x.dtype)
    return _IMPLEMENTATIONS[implementation](
        x, taps, heads=heads, normalize=normalize, document_ids=document_ids
    )

"""Causal attention for the devices that a program is traced for: on TPUs splash attention, elsewhere XLA's.

Shapes: B batch, T tokens, H heads, K key dim (and value dim).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mc_jax.caching.finite import from_there_on
from mc_jax.parallel.rules import is_sharded, spec
from pallas_kernels._finite import not_finite, spoilt, zeroed
from pallas_kernels._platform import on_tpu

# Tokens of a block, and keys that are multiplied at once: on a v5e this takes 14 % fewer bundles than 512 and
# 512. A kernel's schedule is made of whole registers of 128 lanes.
_BLOCK, _AT_ONCE = 1024, 512
_LANES = 128


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids: jax.Array | None, window: int | None
) -> jax.Array:
    """Softmax attention of tokens to themselves and earlier ones [B, T, H, K], in q's dtype.

    On a TPU, for rows of whole blocks of 128 tokens, no T x T logits are ever held, but where devices share
    rows. Keys and values that are not finite are NaN in what sees them, and nowhere else.

    Args:
      q: queries [B, T, H, K], which are scaled here by 1 / sqrt(K).
      k: keys, so too.
      v: values, so too.
      document_ids: [B, T]; packed documents do not see each other. None: one document a row.
      window: tokens that a token sees, its own included; None: all.
    """
    bad, bad_queries = not_finite(k, v, axes=3), not_finite(q, axes=3)
    (k, v), q = zeroed((k, v), bad), zeroed(q, bad_queries)
    earliest = None
    if window is not None:
        earliest = jnp.arange(k.shape[1], dtype=jnp.int32) - (window - 1)
    seen = from_there_on(bad, document_ids, earliest)
    return spoilt(_attend(q, k, v, document_ids, window), seen | bad_queries)


def _attend(q, k, v, document_ids, window):
    shares_rows = is_sharded() and len(spec("tokens")) > 0
    if not on_tpu(q) or q.shape[1] % _LANES or shares_rows:
        return _xla(q, k, v, document_ids, window)
    run = functools.partial(_splash, window)
    if is_sharded():
        per_head = spec("batch", None, "heads")
        run = jax.shard_map(
            run, in_specs=(*[per_head] * 3, spec("batch")), out_specs=per_head, check_vma=False
        )
    return run(q, k, v, document_ids)


def _xla(q, k, v, document_ids, window):
    mask = None
    if document_ids is not None:
        mask = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
    around = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=around)


def _splash(window, q, k, v, document_ids):
    tokens, heads, dim = q.shape[1:]
    block, at_once = math.gcd(tokens, _BLOCK), math.gcd(tokens, _AT_ONCE)
    shape = (tokens, tokens)
    seen = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([seen] * heads), block_sizes=sizes)

    def of_row(q, k, v, ids):
        return kernel(q, k, v, segment_ids=None if ids is None else splash.SegmentIds(ids, ids))

    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(dim**-0.5, q.dtype), k, v))
    return jnp.asarray(jax.vmap(of_row)(q, k, v, document_ids)).swapaxes(1, 2).astype(v.dtype)

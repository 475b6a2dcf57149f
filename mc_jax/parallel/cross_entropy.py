"""Cross-entropy of the output map's logits, of which only a chunk of tokens is there at a time.

On a mesh each device works on its own tokens and its part of the vocabulary: what goes between devices is the
output map and its gradient, and a few numbers a token, never logits.

Shapes: B batch, T tokens, D model dim, V vocabulary, N all tokens, C tokens of a chunk; within a `shard_map`
those of a device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mc_jax.parallel.rules import axes_of, is_sharded, spec
from pallas_kernels._state import state_dtype

# Of a chunk's logits on a device. Backwards each chunk is added to the gradient of the whole map: with fewer
# tokens than these (2,048 at 32,768 logits) that traffic would take longer than the products on a TPU v6e.
_CHUNK_BYTES = 2**28
_TOKENS = ("batch", "tokens")


def cross_entropy(x: jax.Array, output_map: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss of each target in nats [B, T], float32: log sum exp of the logits x W^T, minus the target's logit.

    Products have operands of x's dtype and sums of float32. For the gradient the logits are made again. A
    token whose loss has a cotangent of 0 gives no gradient, even where its x is not finite.

    Args:
      x: [B, T, D], float32 or bfloat16.
      output_map: W [V, D], float32.
      targets: [B, T], int32, in [0, V); the loss of any other one is NaN.
    """
    losses = _cross_entropy(x, output_map, targets)
    return jnp.where((targets >= 0) & (targets < output_map.shape[0]), losses, jnp.nan)


@jax.custom_vjp
def _cross_entropy(x, output_map, targets):
    return _forward(x, output_map, targets)[0]


def _forward(x, output_map, targets):
    words, parts = _words(output_map), _parts(output_map)
    run = functools.partial(_losses, words)
    if is_sharded():
        tokens = spec(*_TOKENS)
        run = jax.shard_map(
            run, in_specs=(tokens, jax.P(words), tokens), out_specs=(tokens, tokens), check_vma=False
        )
    losses, log_sum = run(x, parts(output_map.astype(x.dtype)), targets)
    return losses, (x, output_map, targets, log_sum)


def _backward(residuals, losses_bar):
    x, output_map, targets, log_sum = residuals
    words, parts = _words(output_map), _parts(output_map)
    run = functools.partial(_gradients, words)
    if is_sharded():
        tokens = spec(*_TOKENS)
        run = jax.shard_map(
            run,
            in_specs=(tokens, jax.P(words), tokens, tokens, tokens),
            out_specs=(tokens, jax.P(words, _axes("model"))),
            check_vma=False,
        )
    x_bar, map_bar = run(x, parts(output_map.astype(x.dtype)), targets, log_sum, losses_bar)
    return x_bar, map_bar.astype(output_map.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _losses(words, x, output_map, targets):
    """Losses and log sum exp, [B, T] both."""

    def chunk(_, inputs):
        x_CD, targets_C = inputs
        logits = _logits(x_CD, output_map)
        highest = jnp.max(logits, axis=1)
        highest = jax.lax.pmax(highest, words) if words else highest
        total = jnp.sum(jnp.exp(logits - highest[:, None]), axis=1)
        target = jnp.sum(jnp.where(_is_target(words, logits, targets_C), logits, 0), axis=1)
        total, target = _sum((total, target), words)
        log_sum = highest + jnp.log(total)
        return None, (log_sum - target, log_sum)

    _, (losses, log_sum) = _over_chunks(chunk, None, (x, targets), output_map.shape[0])
    return losses, log_sum


def _gradients(words, x, output_map, targets, log_sum, losses_bar):
    """Gradients of x [B, T, D] and of the part of the output map's model dim that lies here [V, D]."""

    def chunk(map_bar, inputs):
        x_CD, targets_C, log_sum_C, bar_C = inputs
        # 0 times what is not finite would be NaN in the gradient of the whole map.
        x_CD = jnp.where(bar_C[:, None] != 0, x_CD, 0)
        log_sum_C = jnp.where(bar_C != 0, log_sum_C, jnp.inf)
        logits = _logits(x_CD, output_map)
        share = jnp.exp(logits - log_sum_C[:, None])
        logits_bar = bar_C[:, None] * (share - _is_target(words, logits, targets_C).astype(share.dtype))
        logits_bar = logits_bar.astype(x_CD.dtype)
        map_bar += jnp.einsum("cv,cd->vd", logits_bar, x_CD, preferred_element_type=map_bar.dtype)
        x_bar = jnp.einsum("cv,vd->cd", logits_bar, output_map, preferred_element_type=map_bar.dtype)
        return map_bar, x_bar.astype(x_CD.dtype)

    zero = jnp.zeros(output_map.shape, losses_bar.dtype)
    map_bar, x_bar = _over_chunks(chunk, zero, (x, targets, log_sum, losses_bar), output_map.shape[0])
    x_bar = _sum(x_bar, words)
    model = _axes("model")
    map_bar = _sum(map_bar, tuple(axis for name in _TOKENS for axis in _axes(name) if axis not in model))
    if model:
        map_bar = jax.lax.psum_scatter(map_bar, model, scatter_dimension=1, tiled=True)
    return x_bar, map_bar


def _logits(x_CD, output_map):
    return jnp.einsum("cd,vd->cv", x_CD, output_map, preferred_element_type=state_dtype(x_CD))


def _is_target(words, logits, targets_C):
    """[C, V], of the words of this device; part of a sum, so that nothing is gathered."""
    first = jax.lax.axis_index(words) * logits.shape[1] if words else 0
    word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return word == (targets_C - first)[:, None]


def _over_chunks(chunk, carry, per_token: tuple[jax.Array, ...], words: int):
    """Scan over chunks of tokens [B, T, ...] -> [C, ...], with results likewise [B, T, ...]."""
    batch, tokens = per_token[0].shape[:2]
    count = batch * tokens
    # A power of two, as are most batches.
    length = 2 ** int(math.log2(max(1, _CHUNK_BYTES // (4 * words))))
    if count <= length:
        carry, out = chunk(carry, tuple(x.reshape(count, *x.shape[2:]) for x in per_token))
        return carry, jax.tree.map(lambda x: x.reshape(batch, tokens, *x.shape[1:]), out)
    chunks = -(-count // length)

    def cut(x):
        x = x.reshape(count, *x.shape[2:])
        # Tokens that are added have a gradient of 0.
        x = jnp.pad(x, [(0, chunks * length - count), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(chunks, length, *x.shape[1:])

    def joined(x):
        x = x.reshape(chunks * length, *x.shape[2:])[:count]
        return x.reshape(batch, tokens, *x.shape[1:])

    carry, out = jax.lax.scan(chunk, carry, tuple(cut(x) for x in per_token))
    return carry, jax.tree.map(joined, out)


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _axes(name: str) -> tuple[str, ...]:
    """Axes of the current mesh that a dimension is divided over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes_of(name) if sizes[axis] > 1) if is_sharded() else ()


def _words(output_map: jax.Array) -> tuple[str, ...]:
    """Axes that the vocabulary is divided over, if it can be."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = _axes("vocab")
    return () if output_map.shape[0] % math.prod(sizes[axis] for axis in axes) else axes


def _parts(output_map: jax.Array):
    """A constraint that the map lies as the parameter does: it is rounded before it goes between devices."""
    if not is_sharded():
        return lambda x: x
    where = jax.P(_words(output_map), _axes("model"))
    return lambda x: jax.lax.with_sharding_constraint(x, where)

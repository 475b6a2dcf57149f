"""The language model: embedding, scanned blocks, norm, output map.

Shapes: B batch, T tokens, D model dim, H heads, N cached states.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.caching.aggregations import Gates
from mc_jax.config import ModelConfig
from mc_jax.nn.block import Block
from mc_jax.nn.mixer import Dtype, MixerCache
from mc_jax.nn.norm import RMSNorm


class LanguageModel(nnx.Module):
    """Tokens to logits. The blocks' parameters are stacked along a leading axis of layers and scanned."""

    def __init__(self, config: ModelConfig, vocab_size: int, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        """Draw the weights, float32; `dtype` is that of activations, logits are float32."""
        self.config = config
        self.dtype = dtype
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab_size, config.model_dim)))
        self.blocks = _stacked_blocks(config, dtype, rngs.params())
        self.norm = RMSNorm(config.model_dim)
        head = nnx.Linear(config.model_dim, vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.head = None if config.tie_embeddings else head

    def __call__(self, tokens: jax.Array, document_ids: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, vocabulary], float32, of the token after each of tokens [B, T], int32."""
        x, _ = self._scan(lambda block, x, _: (block(x, document_ids)[0], None), self._embed(tokens))
        return self._logits(x)

    def read_gates(self, tokens: jax.Array) -> Gates | None:
        """What each token reads: gates with a leading layer axis, [layers, B, T, H, N] and [layers, B, T, H].

        None where the aggregation is "none".
        """
        return self._scan(lambda block, x, _: block(x, None), self._embed(tokens))[1]

    def prefill(self, tokens: jax.Array, lengths: jax.Array, capacity: int) -> tuple[jax.Array, MixerCache]:
        """Logits after each row's last token [B, vocabulary], and the caches of all layers.

        Args:
          tokens: [B, T], int32; what is at and past a row's length is ignored.
          lengths: tokens in each row [B], int32, at least 1.
          capacity: cached states a layer may come to hold; tokens in all // segment_length.
        """
        x, caches = self._scan(lambda block, x, _: block.prefill(x, lengths, capacity), self._embed(tokens))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last), caches

    def step(self, tokens: jax.Array, caches: MixerCache) -> tuple[jax.Array, MixerCache]:
        """One more token a row [B]: logits [B, vocabulary] of the one after it, and the new caches."""
        x, caches = self._scan(lambda block, x, cache: block.step(x, cache), self._embed(tokens), caches)
        return self._logits(x), caches

    def _embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...].astype(self.dtype)[tokens]

    def _scan(self, apply: Callable[[Block, jax.Array, Any], Any], x: jax.Array, per_layer: Any = None):
        graph, parameters = nnx.split(self.blocks)

        def layer(x, scanned):
            layer_parameters, value = scanned
            return apply(nnx.merge(graph, layer_parameters), x, value)

        return jax.lax.scan(layer, x, (parameters, per_layer))

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        if self.head is None:
            logits = jnp.einsum("...d,vd->...v", x, self.embedding[...].astype(self.dtype))
        else:
            logits = self.head(x)
        return logits.astype(jnp.float32)


def _stacked_blocks(config: ModelConfig, dtype: Dtype, key: jax.Array) -> Block:
    """A block whose every parameter has a leading axis of layers."""

    def parameters(layer_key: jax.Array):
        return nnx.state(Block(config, dtype=dtype, rngs=nnx.Rngs(params=layer_key)))

    stacked = jax.vmap(parameters)(jax.random.split(key, config.num_layers))
    abstract = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(params=key)))
    return nnx.merge(nnx.graphdef(abstract), stacked)

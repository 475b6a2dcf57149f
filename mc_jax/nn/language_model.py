"""The language model: embedding, scanned blocks, norm, output map.

Shapes: B batch, T tokens, D model dim, H heads, N cached states.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax import caching
from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.config import LayerKind, ModelConfig, Remat
from mc_jax.nn.adapters import Adapters, add_adapters
from mc_jax.nn.block import Block
from mc_jax.nn.mixer import Dtype
from mc_jax.nn.norm import RMSNorm
from mc_jax.nn.remat import rematerialize
from mc_jax.parallel import constrain
from mc_jax.parallel.parameters import gather_layer
from pallas_kernels._finite import spoilt
from pallas_kernels._state import state_dtype


class LanguageModel(nnx.Module):
    """Tokens to logits.

    The layers repeat a pattern of mixers. For each place in the pattern there is one block, `blocks_0`,
    `blocks_1`, ..., whose parameters are stacked along a leading axis of repetitions; these are scanned.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        dtype: Dtype = jnp.float32,
        adapters: Adapters | None = None,
        rngs: nnx.Rngs,
    ):
        """Draw the weights, float32.

        Args:
          config: the model.
          vocab_size: tokens that it knows.
          dtype: of activations; logits are float32 or wider.
          adapters: beside maps of the blocks; None: none. All other weights are drawn as without them.
          rngs: source of the initial weights.
        """
        self.config = config
        self.dtype = dtype
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab_size, config.model_dim)))
        for place, kind in enumerate(config.layer_pattern):
            name = f"blocks_{place}"
            of_block = None if adapters is None else adapters.of(name)
            setattr(self, name, _stacked_blocks(config, kind, dtype, of_block, rngs.params()))
        self.norm = RMSNorm(config.model_dim)
        head = nnx.Linear(config.model_dim, vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        self.head = None if config.tie_embeddings else head

    def __call__(
        self,
        tokens: jax.Array,
        document_ids: jax.Array | None = None,
        top_k: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, vocabulary], float32 or wider, of the token after each of tokens [B, T], int32.

        Args:
          tokens: [B, T], int32. From one outside the vocabulary on, its document's logits are NaN.
          document_ids: [B, T] or None; packed documents do not see each other.
          top_k: a traced scalar in place of the config's, while that is annealed; None: the config's.

        Raises:
          ValueError: a token outside the vocabulary, where tokens are not traced.
        """
        x = self.features(tokens, document_ids, top_k)
        logits = jnp.einsum("btd,vd->btv", x, self.output_map.astype(self.dtype))
        return constrain(logits.astype(state_dtype(logits)), "batch", "tokens")

    def features(
        self,
        tokens: jax.Array,
        document_ids: jax.Array | None = None,
        top_k: jax.Array | None = None,
        *,
        remat: Remat = "none",
    ) -> jax.Array:
        """What the output map gets [B, T, D], in the dtype of activations; arguments as of a call.

        `remat` is what blocks save for their gradient (`mc_jax.nn.remat`); it changes no number.
        """

        def apply(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x, document_ids, top_k)[0], "batch", "tokens"), None

        x, _ = self._scan(apply, constrain(self._embed(tokens), "batch", "tokens"), remat=remat)
        return self.norm(x)

    @property
    def output_map(self) -> jax.Array:
        """From features to logits [vocabulary, D], float32: the embedding, if they are tied."""
        return self.embedding[...] if self.head is None else self.head.kernel[...].T

    def read_gates(self, tokens: jax.Array) -> Gates | None:
        """What each token reads in the layers with a memory: gates [layers, B, T, H(, N)].

        None where there is no such layer, or the aggregation is "none".
        """
        segments = -(-tokens.shape[1] // self.config.segment_length)
        return self.map_gates(
            tokens, lambda gates: gates.dense(segments) if isinstance(gates, Selection) else gates
        )

    def map_gates[T](self, tokens: jax.Array, function: Callable[[Gates | Selection], T]) -> T | None:
        """What a function makes of each layer's gates, stacked along a leading axis of layers with a memory.

        The gates of one layer at a time are held. Documents are not told apart: a row is one, from its start.

        Args:
          tokens: [B, T], int32.
          function: from a layer's gates, as its mixer has them, to a pytree of arrays.

        Returns:
          The function's pytree, each leaf with the leading axis; None where `read_gates` is.
        """

        def read(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, T | None]:
            x, gates = block(x, None, None)
            return constrain(x, "batch", "tokens"), None if gates is None else function(gates)

        _, kept = self._scan(read, constrain(self._embed(tokens), "batch", "tokens"))
        kept = [made for made in kept if made is not None]
        if not kept:
            return None
        # One after another as the layers are: [repetitions, places, ...] -> [layers, ...].
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *kept)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)

    def prefill(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        max_length: int,
        storage: caching.Storage = caching.Storage(),  # noqa: B008 - frozen
    ) -> tuple[jax.Array, Any]:
        """Logits after each row's last token [B, vocabulary], and the caches of all layers.

        Args:
          tokens: [B, T], int32; what is at and past a row's length is ignored.
          lengths: tokens in each row [B], int32, at least 1.
          max_length: tokens that a row may come to hold.
          storage: how cached memories are kept; without `max_cached` there is a place for each segment.

        Raises:
          ValueError: a storage that has no effect, or with too few places for the tokens.
        """
        self._must_have_effect(storage)
        inside = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        x = self._embed(jnp.where(inside, tokens, 0))
        x, caches = self._scan(lambda block, x, _: block.prefill(x, lengths, max_length, storage), x)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last), caches

    def begin(
        self,
        batch: int,
        max_length: int,
        storage: caching.Storage = caching.Storage(),  # noqa: B008 - frozen
    ) -> Any:
        """The caches of all layers before the first token of `batch` rows, for `extend`.

        Args:
          batch: rows.
          max_length: tokens that a row may come to hold.
          storage: as of `prefill`.

        Raises:
          ValueError: a storage that has no effect.
        """
        self._must_have_effect(storage)
        x = jnp.zeros((), self.dtype)
        _, caches = self._scan(lambda block, x, _: (x, block.begin(batch, max_length, storage)), x)
        return caches

    def extend(self, tokens: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """What the output map gets of tokens that go on from caches [B, T, D], and the next caches.

        Args:
          tokens: [B, T], int32: whole segments, in all rows as many.
          caches: of any method, after whole segments; rows may differ in how many. A row that has begun
            one is NaN from here on.
        """
        x, caches = self._scan(lambda block, x, cache: block.extend(x, cache), self._embed(tokens), caches)
        return self.norm(x), caches

    def step(self, tokens: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """One more token a row [B]: logits [B, vocabulary] of the one after it, and the new caches."""
        x = self._embed(tokens)
        x, caches = self._scan(lambda block, x, cache: block.step(x, cache), x, caches)
        return self._logits(x), caches

    def _must_have_effect(self, storage: caching.Storage) -> None:
        if "memory" not in self.config.layer_pattern and storage != caching.Storage():
            raise ValueError("a storage has no effect on a model without memory layers; leave it out")

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [..., D]; a token outside the vocabulary is an error, and NaN if it is traced."""
        words = self.embedding.shape[0]
        unknown = (tokens < 0) | (tokens >= words)
        if not isinstance(unknown, jax.core.Tracer) and np.any(unknown):
            raise ValueError(
                f"token {int(tokens[unknown][0])} is outside the vocabulary of {words}; "
                "give tokens of the model's own tokenizer"
            )
        return spoilt(self.embedding[...].astype(self.dtype)[tokens], unknown)

    def _scan(
        self,
        apply: Callable[[Block, jax.Array, Any], Any],
        x: jax.Array,
        per_layer: Any = None,
        *,
        remat: Remat = "none",
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Pass x through all layers; what each keeps is stacked, one pytree for each place of the pattern."""
        places = range(len(self.config.layer_pattern))
        parts = [nnx.split(getattr(self, f"blocks_{place}")) for place in places]
        per_layer = tuple(None for _ in places) if per_layer is None else per_layer

        # A loop of one turn is none, for the compiler.
        one = self.config.num_layers == len(places)

        def repetition(x, scanned):
            kept = []
            for (graph, _), parameters, value in zip(parts, *scanned, strict=True):

                def block(x, parameters, value, graph=graph):
                    return apply(nnx.merge(graph, gather_layer(parameters, self.dtype)), x, value)

                x, keep = rematerialize(block, remat, prevent_cse=one)(x, parameters, value)
                kept.append(keep)
            return x, tuple(kept)

        return jax.lax.scan(repetition, x, (tuple(parameters for _, parameters in parts), per_layer))

    def _logits(self, x: jax.Array) -> jax.Array:
        """Logits of features x before the last norm [B, D], in decoding."""
        logits = jnp.einsum("bd,vd->bv", self.norm(x), self.output_map.astype(self.dtype))
        return logits.astype(state_dtype(logits))


def _stacked_blocks(
    config: ModelConfig, kind: LayerKind, dtype: Dtype, adapters: Adapters | None, key: jax.Array
) -> Block:
    """A block whose every parameter has a leading axis of repetitions."""

    def build(key: jax.Array) -> Block:
        rngs = nnx.Rngs(params=key)
        block = Block(config, kind, dtype=dtype, rngs=rngs)
        if adapters is not None:
            add_adapters(block, adapters, rngs)
        return block

    repetitions = config.num_layers // len(config.layer_pattern)
    stacked = jax.vmap(lambda key: nnx.state(build(key)))(jax.random.split(key, repetitions))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(key))), stacked)

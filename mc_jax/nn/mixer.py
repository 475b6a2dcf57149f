"""The Memory Caching mixer: maps, convolution and gates around the functional core (docs/math.md section 5).

Shapes: B batch, T tokens, D model dim, H heads, K key dim, V value dim, R router dim.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax import caching
from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.memories import Coefficients, memory_for
from mc_jax.nn.convolution import ShortConvolution
from mc_jax.nn.norm import RMSNorm
from mc_jax.parallel import memory
from pallas_kernels import unit_length
from pallas_kernels._finite import not_finite
from pallas_kernels._state import Weights

type Dtype = Any
"""What jax.numpy takes as a dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerCache:
    """What a mixer keeps between tokens."""

    memory: caching.Cache
    """The online and the cached memories."""
    tail: jax.Array
    """The convolution's last inputs [B, width - 1, 2 H K + D], of q, k and v side by side."""


class _Written(NamedTuple):
    """Arguments of the functional core, per token."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    routing: caching.Routing | None
    coefficients: Coefficients


class MemoryCaching(nnx.Module):
    """A causal sequence mixer [B, T, D] -> [B, T, D] for anybody's block.

    Queries, keys and values pass linear maps, a short causal convolution and SiLU; queries and keys are
    l2-normalised per head; retention, step and momentum are maps of the input, per token and head; what
    is read is RMS-normalised per head, gated by the input and mapped back.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        key_dim: int | None = None,
        settings: caching.Settings,
        mlp: bool = False,
        router_keys: str = "inputs",
        router_dim: int | None = None,
        online_logit: str = "learned",
        cache_scale: str | None = None,
        convolution_width: int = 4,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draw the weights.

        Args:
          model_dim: width D of input and output.
          num_heads: memories H, each with values of V = D / H.
          key_dim: K of keys and queries, with which a matrix memory grows and shrinks; None: V.
          settings: memory, aggregation, segments.
          mlp: the memory's state is an MLP with hidden width 4 D / H ("dla", "titans"), and not a matrix.
          router_keys: what is pooled over a segment: "inputs" (a learned map of them) or "keys".
          router_dim: R of the router's queries and of its map of the inputs; None: V. Keys have their own, K.
          online_logit: the online memory's logit: "learned" (a map of the input) or "running_mean".
          cache_scale: "learned", a factor per head, at first 0, on what the cache changes of a read; None: 1.
          convolution_width: taps of the causal convolution, 1 for none.
          dtype: of activations; parameters are float32.
          rngs: source of the initial weights.

        Raises:
          ValueError: num_heads does not divide model_dim, the memory has no MLP form, an MLP is to have keys
            and values of different dims, a matrix a branch, or keys that are pooled another dim.
        """
        if model_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide model_dim {model_dim}; choose a divisor")
        self.num_heads = num_heads
        self.settings = settings
        self.dtype = dtype

        head_dim = model_dim // num_heads
        key_dim = head_dim if key_dim is None else key_dim
        if mlp and key_dim != head_dim:
            raise ValueError(
                f"key_dim {key_dim} is not the {head_dim} of an MLP's values, to which it adds its query; "
                "leave key_dim out"
            )

        def linear(outputs: int, **options: Any) -> nnx.Linear:
            return nnx.Linear(model_dim, outputs, use_bias=False, dtype=dtype, rngs=rngs, **options)

        keys = num_heads * key_dim
        self._parts = (keys, 2 * keys)
        self.query, self.key, self.value = linear(keys), linear(keys), linear(model_dim)
        self.convolution = ShortConvolution(2 * keys + model_dim, convolution_width, dtype=dtype, rngs=rngs)
        self.initial = _InitialMlp(num_heads, head_dim, rngs) if mlp else None
        recurrence = memory_for(settings.memory, self._initial_state(), settings.branch)
        names = recurrence.coefficients

        # A chunk of these is one gradient step of all its tokens: with steps of 1/2 each it would diverge.
        # Momentum 1/2 doubles what a token writes, so the whole chunk's step starts at 1.
        first_step = 0.5 / settings.chunk_length if recurrence.takes_gradients else 0.5
        wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32

        def fraction(name: str, start: float = 0.5) -> _Fraction | None:
            return _Fraction(model_dim, num_heads, start, wide, rngs) if name in names else None

        self.retention = _Retention(model_dim, num_heads, wide, rngs) if "retention" in names else None
        self.step_size = fraction("step", first_step)
        self.momentum = fraction("momentum")
        self.previous_step = fraction("previous_step")
        uses_router = settings.about.uses_router
        pools_keys = router_keys == "keys"
        if router_dim is not None and (pools_keys or not uses_router):
            reason = "router_keys 'keys'" if uses_router else f"aggregation {settings.aggregation!r}"
            raise ValueError(f"router_dim {router_dim} has no effect with {reason}; leave it out")
        width = model_dim if router_dim is None else num_heads * router_dim
        # Of zeros: all cached memories are weighed alike at first, and not at random, from which many a model
        # does not recover (associative recall, one seed: 55 % right with random queries, 97 % with these).
        router_query = functools.partial(linear, kernel_init=nnx.initializers.zeros_init())
        self.router_query = router_query(keys if pools_keys else width) if uses_router else None
        self.router_key = linear(width) if uses_router and not pools_keys else None
        self.online_logit = linear(num_heads) if uses_router and online_logit == "learned" else None
        scale = jnp.zeros((num_heads,), jnp.float32)
        self.cache_scale = None if cache_scale is None else nnx.Param(scale)
        self.norm = RMSNorm(head_dim)
        self.output_gate = linear(model_dim)
        self.output = linear(model_dim)

    def __call__(
        self,
        x: jax.Array,
        document_ids: jax.Array | None = None,
        top_k: jax.Array | None = None,
    ) -> jax.Array:
        """Mix tokens x [B, T, D]; packed documents [B, T] do not see each other.

        For "titans", and with `mlp`, documents must start at chunk boundaries. `top_k`, a traced scalar,
        takes the place of the settings' while that is annealed.
        """
        return self.apply(x, document_ids, top_k)[0]

    def apply(
        self,
        x: jax.Array,
        document_ids: jax.Array | None = None,
        top_k: jax.Array | None = None,
    ) -> tuple[jax.Array, Gates | Selection | None]:
        """What a call gives, with the weights of the memories that each token read."""
        x, bad = self._without_bad(x, document_ids)
        y, gates = memory.forward(
            *self._write(x, self._convolved(self._qkv(x), document_ids)),
            self.settings,
            document_ids=document_ids,
            initial_state=self._initial_state(),
            top_k=top_k,
            bad=bad,
        )
        return self._out(x, y), gates

    def prefill(
        self, x: jax.Array, lengths: jax.Array, max_length: int, storage: caching.Storage
    ) -> tuple[jax.Array, MixerCache]:
        """What a call gives on rows of `lengths` [B] tokens, and the cache to go on with up to `max_length`.

        Without a `max_cached` in the storage there will be a place for every segment.
        """
        x, bad = self._without_bad(x, None)
        inputs = self._qkv(x)
        output = caching.forward(
            *self._write(x, self._convolved(inputs)),
            self.settings,
            initial_state=self._initial_state(),
            lengths=lengths,
            bad=bad,
        )
        cache = output.cache
        cache = cache.with_storage(self._with_places(storage, max_length, cache.capacity))
        tails = [self.convolution.tail(part, lengths) for part in inputs]
        return self._out(x, output.y), MixerCache(cache, jnp.concatenate(tails, axis=-1))

    def begin(self, batch: int, max_length: int, storage: caching.Storage) -> MixerCache:
        """The cache before the first token of `batch` rows, for `extend` up to `max_length` tokens a row."""
        settings = self.settings
        row = jnp.zeros((batch, settings.segment_length, self.query.kernel.shape[0]), self.dtype)
        lengths = jnp.full((batch,), settings.segment_length, jnp.int32)
        like = jax.eval_shape(
            lambda: self.prefill(row, lengths, settings.segment_length, caching.Storage())[1]
        )
        initial = jax.tree.map(jnp.copy, self._initial_state())
        cache = caching.empty(dataclasses.replace(like.memory, initial=initial))
        cache = dataclasses.replace(cache, storage=caching.Storage())
        cache = cache.with_storage(self._with_places(storage, max_length))
        return MixerCache(cache, jnp.zeros(like.tail.shape, like.tail.dtype))

    def extend(self, x: jax.Array, cache: MixerCache) -> tuple[jax.Array, MixerCache]:
        """Mix tokens x [B, T, D], whole segments that go on from a cache, and leave the next one."""
        x, bad = self._without_bad(x, None)
        inputs = self._qkv(x)
        tails = jnp.split(cache.tail, self._parts, axis=-1)
        before = cache.tail.shape[1]
        joined = tuple(
            jnp.concatenate([tail, part.astype(tail.dtype)], axis=1)
            for tail, part in zip(tails, inputs, strict=True)
        )
        written = self._write(x, tuple(part[:, before:] for part in self._convolved(joined)))
        output = caching.forward_from(cache.memory, *written, bad=bad)
        tail = jnp.concatenate([part[:, part.shape[1] - before :] for part in joined], axis=-1)
        return self._out(x, output.y), MixerCache(output.cache, tail)

    def step(self, x: jax.Array, cache: MixerCache) -> tuple[jax.Array, MixerCache]:
        """One more token a row, x [B, D]."""
        joined, tail = self.convolution.step(jnp.concatenate(self._qkv(x), axis=-1), cache.tail)
        q, k, v = (self._heads(part) for part in jnp.split(joined, self._parts, axis=-1))
        y, memory = caching.decode(*self._write(x, (unit_length(q), unit_length(k), v)), cache.memory)
        return self._out(x, y), MixerCache(memory, tail)

    def _with_places(self, storage: caching.Storage, max_length: int, least: int = 1) -> caching.Storage:
        """The storage with a place for each segment of `max_length` tokens, if it does not say how many."""
        if storage.max_cached is not None or not self.settings.about.reads_cache:
            return storage
        places = max(max_length // self.settings.segment_length, least, 1)
        return dataclasses.replace(storage, max_cached=places)

    def _without_bad(self, x: jax.Array, document_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Tokens x [B, T, D] with zeros for those that are not finite, and which the convolution makes so."""
        bad = not_finite(x, axes=2)
        width = self.convolution.taps.shape[0]
        return jnp.where(bad[..., None], 0, x), caching.seen_by_convolution(bad, document_ids, width)

    def _initial_state(self) -> Weights | None:
        return None if self.initial is None else (self.initial.w_in[...], self.initial.w_out[...])

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query(x), self.key(x), self.value(x)

    def _convolved(self, parts: tuple[jax.Array, ...], document_ids: jax.Array | None = None) -> Any:
        """Queries, keys and values in heads: the convolution never mixes channels, so each has its own."""
        return tuple(
            self.convolution(
                part, document_ids, heads=self.num_heads, normalize=place < 2, first=(0, *self._parts)[place]
            )
            for place, part in enumerate(parts)
        )

    def _write(self, x: jax.Array, qkv: tuple[jax.Array, jax.Array, jax.Array]) -> _Written:
        q, k, v = qkv
        routing = scale = None
        if self.cache_scale is not None:
            scale = jnp.broadcast_to(self.cache_scale[...], (*x.shape[:-1], self.num_heads))
            routing = caching.Routing(None, None, None, scale)
        if self.router_query is not None:
            routing = caching.Routing(
                u=self._heads(self.router_query(x)),
                keys=k if self.router_key is None else self._heads(self.router_key(x)),
                online_logit=None if self.online_logit is None else self.online_logit(x),
                cache_scale=scale,
            )
        maps = (self.retention, self.momentum, self.step_size, self.previous_step)
        coefficients = Coefficients(*(None if map is None else map(x) for map in maps))
        return _Written(q, k, v, routing, coefficients)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def _out(self, x: jax.Array, y: jax.Array) -> jax.Array:
        y = self.norm(y).reshape(x.shape)
        return self.output(y * nnx.silu(self.output_gate(x)))


class _Retention(nnx.Module):
    """a = exp(-exp(rate) softplus(W x + bias)), in `wide`: the parametrisation of Gated DeltaNet."""

    def __init__(self, model_dim: int, num_heads: int, wide: Dtype, rngs: nnx.Rngs):
        # Rates of 1 to 16 times steps of 0.001 to 0.1: memories of about one to a thousand tokens.
        self.log_rate = nnx.Param(
            jnp.log(jax.random.uniform(rngs.params(), (num_heads,), minval=1.0, maxval=16.0))
        )
        step = jnp.exp(
            jax.random.uniform(rngs.params(), (num_heads,), minval=jnp.log(0.001), maxval=jnp.log(0.1))
        )
        self.map = nnx.Linear(model_dim, num_heads, dtype=wide, rngs=rngs)
        self.map.bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)))  # softplus of it is `step`

    def __call__(self, x: jax.Array) -> jax.Array:
        steps = nnx.softplus(self.map(x))
        rate = jnp.exp(self.log_rate[...].astype(steps.dtype))
        return jnp.exp(-rate.reshape((1,) * (steps.ndim - 1) + (-1,)) * steps)


class _Fraction(nnx.Module):
    """sigmoid(W x + bias), in `wide`; the bias alone gives `start`."""

    def __init__(self, model_dim: int, num_heads: int, start: float, wide: Dtype, rngs: nnx.Rngs):
        self.map = nnx.Linear(model_dim, num_heads, dtype=wide, rngs=rngs)
        self.map.bias = nnx.Param(jnp.full((num_heads,), math.log(start / (1 - start)), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.sigmoid(self.map(x))


class _InitialMlp(nnx.Module):
    """What an MLP memory starts from, learned per head; never all zero, which has no gradient for ever."""

    def __init__(self, num_heads: int, head_dim: int, rngs: nnx.Rngs):
        hidden = 4 * head_dim
        self.w_in = nnx.Param(
            jax.random.normal(rngs.params(), (num_heads, head_dim, hidden)) * head_dim**-0.5
        )
        self.w_out = nnx.Param(jax.random.normal(rngs.params(), (num_heads, hidden, head_dim)) * hidden**-0.5)

"""Tokens that go on from a cache, many at once, are the same decoded one by one, and those of a whole row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.caching import Storage
from mc_jax.config import ModelConfig
from mc_jax.nn import LanguageModel

TINY = ModelConfig(
    num_layers=1, model_dim=16, num_heads=2, mlp_dim=16, segment_length=4, chunk_length=2, aggregation="gated"
)
VOCABULARY, BATCH, LENGTH = 19, 2, 40
STORAGES = {
    "the oldest dropped": Storage(max_cached=3, when_full="drop-oldest"),
    "int8": Storage(state_dtype="int8"),
}


def _model(**changes) -> LanguageModel:
    model = LanguageModel(dataclasses.replace(TINY, **changes), VOCABULARY, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), state))


def _tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCABULARY, jnp.int32)


def _by_chunks(model: LanguageModel, sizes, storage=None):
    """Features of all tokens, read in chunks of these sizes, and the caches after them."""
    storage = Storage() if storage is None else storage
    caches = jax.jit(lambda: model.begin(BATCH, LENGTH, storage))()
    extend, found, start = jax.jit(model.extend), [], 0
    for size in sizes:
        x, caches = extend(_tokens()[:, start : start + size], caches)
        found.append(x)
        start += size
    return jnp.concatenate(found, axis=1), caches


def test_chunks_of_a_row_are_the_row_for_attention():
    model = _model(num_layers=2, layer_pattern=("attention", "window"), attention_window=7)
    expected = jax.jit(model.features)(_tokens())
    found, _ = _by_chunks(model, (20, 20))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "storage"),
    [
        ({"segment_init": "independent"}, "the oldest dropped"),
        ({"memory": "delta", "aggregation": "sparse", "top_k": 2}, "int8"),
    ],
    ids=str,
)
def test_chunks_keep_memories_as_decoding_does(settings, storage):
    model = _model(**settings)
    found, caches = _by_chunks(model, (20, 20), STORAGES[storage])
    whole = jax.jit(model.features)(_tokens())
    assert jnp.max(jnp.abs(found - whole)) > 1e-4, "the storage changes nothing"

    @jax.jit
    def decode(caches):
        return jax.lax.scan(lambda caches, token: model.step(token, caches)[::-1], caches, _tokens().T)

    after, logits = decode(jax.jit(lambda: model.begin(BATCH, LENGTH, STORAGES[storage]))())
    expected = jnp.einsum("btd,vd->tbv", found, model.output_map)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    for one, other in zip(jax.tree.leaves(caches), jax.tree.leaves(after), strict=True):
        # Of int8, a number may be rounded to its neighbour.
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(other, np.float32),
            atol=1 if one.dtype == jnp.int8 else 2e-5,
        )


def test_a_cache_that_is_full_gives_nan_and_nothing_before_changes():
    model = _model()
    found, _ = _by_chunks(model, (20, 20), Storage(max_cached=6))
    full = 7 * TINY.segment_length  # the first token after seven segments
    assert not jnp.isnan(found[:, :full]).any()
    assert jnp.isnan(found[:, full:]).all()


def test_tokens_that_are_no_whole_segments_are_refused():
    with pytest.raises(ValueError, match="6 tokens are not whole segments of 4"):
        _by_chunks(_model(), (6,))

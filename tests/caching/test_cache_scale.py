"""A factor on what the cache changes of a read: how a memory is added to a model that was trained without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, SEGMENT, arguments
from flax import nnx
from untrained import config_of, model_of

from mc_jax.caching import Routing, Settings, forward
from mc_jax.config import MeshConfig
from mc_jax.memories import Coefficients
from mc_jax.nn import LanguageModel
from mc_jax.parallel import make_mesh
from mc_jax.training.step import by_name, from_names, merge_model, split_model, token_losses


def read(found, aggregation, scale=None):
    """Reads of the functional core with a scale [B, T, H], or without."""
    settings = Settings(
        aggregation=aggregation, segment_length=SEGMENT, chunk_length=CHUNK, **AGGREGATIONS[aggregation]
    )
    routing = None
    if "u" in found:
        routing = Routing(found["u"], found["router_keys"], found["online_logit"], scale)
    elif scale is not None:
        routing = Routing(None, None, None, scale)
    coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})
    initial = found["initial_state"]
    return forward(
        found["q"], found["k"], found["v"], routing, coefficients, settings, initial_state=initial
    ).y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("aggregation", ["residual", "gated"])
def test_a_scale_goes_from_the_online_memory_to_the_whole_read(aggregation):
    found = arguments("linear", False, aggregation)
    online, whole = (jax.jit(lambda name=name: read(found, name))() for name in ("none", aggregation))
    shape = found["q"].shape[:3]
    scaled = jax.jit(lambda scale: read(found, aggregation, scale))
    np.testing.assert_array_equal(scaled(jnp.zeros(shape)), online)
    np.testing.assert_allclose(scaled(jnp.ones(shape)), whole, rtol=1e-12, atol=1e-12)
    scale = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    mixed = online + scale[..., None] * (whole - online)
    np.testing.assert_allclose(scaled(scale), mixed, rtol=1e-12, atol=1e-12)


def with_memory_added(aggregation, **model):
    """A model without memory, and its weights in one that has it, whose own are drawn."""
    base = model_of(config_of(aggregation="none", **model))
    config = config_of(aggregation=aggregation, cache_scale="learned", **AGGREGATIONS[aggregation], **model)
    graph, drawn = split_model(LanguageModel(config.model, 257, rngs=nnx.Rngs(params=1)))
    return base, graph, from_names(by_name(drawn) | by_name(split_model(base)[1]))


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 32)).astype(np.int32)


@pytest.mark.parametrize(
    ("aggregation", "model"),
    [("sparse", {}), ("soup", {"memory": "dla", "memory_depth": 2})],
    ids=["sparse", "soup of MLPs"],
)
def test_a_memory_that_is_added_changes_no_logit(aggregation, model):
    base, graph, parameters = with_memory_added(aggregation, **model)
    logits = jax.jit(lambda parameters: merge_model(graph, parameters)(jnp.asarray(TOKENS)))(parameters)
    np.testing.assert_array_equal(logits, jax.jit(lambda tokens: base(tokens))(TOKENS))


def test_a_memory_that_is_added_is_trained_by_its_scale_first_and_then_by_its_router():
    _, graph, parameters = with_memory_added("gated")
    batch = {"inputs": TOKENS, "targets": TOKENS, "document_ids": 0 * TOKENS, "loss_mask": np.ones((2, 32))}
    batch["loss_mask"] = batch["loss_mask"].astype(np.float32)

    @jax.jit
    @jax.grad
    def gradients(parameters):
        return jnp.mean(token_losses(merge_model(graph, parameters), jax.tree.map(jnp.asarray, batch)))

    scale = "blocks_0.mixer.cache_scale"
    at_first = by_name(gradients(parameters))
    assert np.abs(at_first[scale]).min() > 1e-5, "nothing could ever be learned"
    moved = by_name(parameters) | {scale: by_name(parameters)[scale] + 1e-3}
    then = by_name(gradients(from_names(moved)))
    for name in ("router_query", "online_logit"):
        assert not np.any(at_first[f"blocks_0.mixer.{name}.kernel"])
        assert np.linalg.norm(then[f"blocks_0.mixer.{name}.kernel"]) > 1e-6, name


def test_a_scaled_read_is_the_same_on_devices_that_share_heads_and_tokens():
    _, graph, parameters = with_memory_added("residual")
    moved = by_name(parameters)
    moved["blocks_0.mixer.cache_scale"] = moved["blocks_0.mixer.cache_scale"] + jnp.array([[0.5, 2.0]])
    model = merge_model(graph, from_names(moved))
    expected = jax.jit(lambda tokens: model(tokens))(TOKENS)
    with jax.set_mesh(make_mesh(MeshConfig(sequence=2, tensor=2), jax.devices()[:4])):
        np.testing.assert_allclose(jax.jit(lambda tokens: model(tokens))(TOKENS), expected, atol=1e-5)

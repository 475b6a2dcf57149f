"""What a router reads on average is what a loop over tokens and memories finds, on any mesh."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from mc_jax.config import Config, DataConfig, MeshConfig, ModelConfig, validate
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import memory_store
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.data.windows import spread_sequences
from mc_jax.parallel import make_mesh
from mc_jax.training.router_shares import RouterOnText, distances_to, has_router, memory_layers
from mc_jax.training.run import abstract_state, new_state
from mc_jax.training.step import merge_model

SEGMENT, LENGTH = 4, 32
MODELS = {
    "gated": {"layer_pattern": ("memory", "attention"), "num_layers": 4},
    "sparse, few states": {"aggregation": "sparse", "top_k": 2},
    "sparse, grouped": {"aggregation": "sparse", "top_k": 1},
    "scaled": {"cache_scale": "learned"},
    "null": {"aggregation": "null"},
    "null, grouped": {"aggregation": "null", "top_k": 1},
    "logarithmic": {"segmentation": "logarithmic", "segment_init": "independent"},
}


def _store(texts):
    tokenizer = ByteTokenizer()
    documents = (Document(str(number), text) for number, text in enumerate(texts))
    return memory_store(tokenize(documents, tokenizer), tokenizer)


@pytest.fixture(scope="module")
def store():
    return _store(["a short one", "the sea was calm and the wind came from the west; " * 2, "abc"])


def _config(**model) -> Config:
    sizes = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16, "chunk_length": SEGMENT}
    model = ModelConfig(**sizes | {"segment_length": SEGMENT, "aggregation": "gated"} | model)
    return validate(Config(model=model, data=DataConfig(context_length=LENGTH)))


def _parameters(config):
    """Drawn, with queries of the router that prefer one memory to another."""
    graph, state = new_state(config, ByteTokenizer().vocab_size)
    key = jax.random.key(1)

    def draw(path, x):
        drawn = any(name in jax.tree_util.keystr(path) for name in ("router_query", "cache_scale"))
        return jax.random.normal(key, x.shape) if drawn else x

    return graph, jax.tree_util.tree_map_with_path(draw, state.parameters)


def _by_loop(gates, lengths, distances, has_null):
    """Of dense gates: the four of a reading, the even shares by distance, and the number of tokens."""
    layers, _, _, heads, states = gates.cached.shape
    found = [np.zeros((layers, heads)) for _ in range(3)] + [np.zeros((layers, heads, len(distances)))]
    even, count = np.zeros(len(distances)), 0
    for row, length in enumerate(lengths):
        for token in range(SEGMENT, length):
            own = token // SEGMENT
            count += 1
            for bin, (first, last) in enumerate(distances):
                even[bin] += sum(first <= own - state <= last for state in range(own)) / (own + 1)
            for layer in range(layers):
                for head in range(heads):
                    place = layer, head
                    shares = gates.cached[layer, row, token, head].astype(np.float64)
                    online = gates.online[layer, row, token, head]
                    shares = np.abs([*shares, 1 - shares.sum() if has_null else online])
                    shares /= shares.sum()
                    entropy = -sum(share * math.log(share) for share in shares if share > 0)
                    found[0][place] += 1 - shares[-1]
                    found[1][place] += entropy
                    found[2][place] += entropy / math.log(own + 1)
                    for bin, (first, last) in enumerate(distances):
                        found[3][place][bin] += sum(
                            shares[state] for state in range(states) if first <= own - state <= last
                        )
    return [total / count for total in found], even / count, count


@pytest.mark.parametrize("name", MODELS)
def test_shares_and_entropies_are_those_of_a_loop_over_tokens_and_memories(name, store):
    config = _config(**MODELS[name])
    graph, parameters = _parameters(config)
    shares = RouterOnText(graph, config, store).measure(parameters)
    assert shares is not None
    rows = spread_sequences(store, length=LENGTH, count=4)
    lengths = [len(row) for row in rows]
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
    gates = jax.device_get(jax.jit(merge_model(graph, parameters).read_gates)(tokens))
    expected, even, count = _by_loop(gates, lengths, shares.distances, name.startswith("null"))
    assert shares.tokens == count
    assert shares.layers == ((1, 3) if name == "gated" else (1,))
    for field, found, wanted in zip(shares.reading._fields, shares.reading, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=field)
    np.testing.assert_allclose(shares.even_by_distance, even, atol=1e-12)
    np.testing.assert_allclose(shares.even_cached, even.sum(), atol=1e-12)
    np.testing.assert_allclose(shares.reading.by_distance.sum(axis=-1), shares.reading.cached, atol=1e-6)
    assert np.ptp(shares.reading.cached) > 1e-3, "heads that all read alike would hide a mixed-up axis"


def test_a_router_that_weighs_all_alike_has_the_even_shares(store):
    config = _config(online_logit="running_mean")  # queries of zeros score all memories alike
    graph, state = new_state(config, ByteTokenizer().vocab_size)
    shares = RouterOnText(graph, config, store).measure(state.parameters)
    assert shares is not None
    np.testing.assert_allclose(shares.reading.cached, shares.even_cached, atol=1e-6)
    np.testing.assert_allclose(shares.reading.relative_entropy, 1, atol=1e-6)
    for place, even in enumerate(shares.even_by_distance):
        np.testing.assert_allclose(shares.reading.by_distance[..., place], even, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}], ids=str)
def test_no_share_depends_on_the_mesh(sizes, store):
    config = _config(aggregation="sparse", top_k=1)
    graph, parameters = _parameters(config)
    alone = RouterOnText(graph, config, store).measure(parameters)
    config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
    with jax.set_mesh(make_mesh(config.mesh)):
        _, like = abstract_state(config, ByteTokenizer().vocab_size)
        placed = jax.device_put(parameters, jax.tree.map(lambda x: x.sharding, like.parameters))
        shared = RouterOnText(graph, config, store).measure(placed)
    assert alone is not None
    assert shared is not None
    assert shared.tokens == alone.tokens
    for field, found, wanted in zip(alone.reading._fields, shared.reading, alone.reading, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=field)


def test_text_that_fits_in_one_segment_has_nothing_to_tell():
    config = _config()
    graph, parameters = _parameters(config)
    assert RouterOnText(graph, config, _store(["abc", ""])).measure(parameters) is None


def test_metrics_name_layers_and_json_has_every_head(store):
    config = _config(**MODELS["gated"])
    graph, parameters = _parameters(config)
    shares = RouterOnText(graph, config, store).measure(parameters)
    assert shares is not None
    metrics, values = shares.metrics(), shares.to_json()
    assert set(metrics) == {
        "router_cached_share", "router_entropy", "router_relative_entropy",
        "router_cached_share_layer_1", "router_entropy_layer_1",
        "router_cached_share_layer_3", "router_entropy_layer_3",
    }  # fmt: skip
    of_layers = [metrics["router_cached_share_layer_1"], metrics["router_cached_share_layer_3"]]
    assert metrics["router_cached_share"] == pytest.approx(np.mean(of_layers))
    assert [layer["layer"] for layer in values["layers"]] == [1, 3]
    for layer, share in zip(values["layers"], of_layers, strict=True):
        assert np.mean(layer["cached_share_of_heads"]) == pytest.approx(share)
        assert sum(layer["share_by_distance"]) == pytest.approx(share, abs=1e-6)


def test_models_without_gates_by_token_have_no_router():
    assert has_router(_config().model)
    assert not has_router(_config(aggregation="residual").model)
    assert not has_router(_config(layer_pattern=("attention",)).model)
    pattern = _config(layer_pattern=("attention", "memory"), num_layers=4).model
    assert memory_layers(pattern) == (2, 4)


def test_distances_double():
    assert distances_to(0) == ()
    assert distances_to(1) == ((1, 1),)
    assert distances_to(11) == ((1, 1), (2, 2), (3, 4), (5, 8), (9, 11))

"""A memory "ungated" and an aggregation "recent" in use: tests/test_extending.py adds them to a copy."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mc_jax
from mc_jax import memory_caching
from mc_jax._arguments import parse
from mc_jax._eval_command.arguments import ModelDial
from mc_jax.caching import Storage
from mc_jax.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig, validate
from mc_jax.evaluation.dial import turned_config
from mc_jax.evaluation.sweep.cost import memory_bytes
from mc_jax.nn import LanguageModel
from mc_jax.planning.formulas import cached_flops, memory_flops
from mc_jax.training.run import drawing
from mc_jax.training.step import merge_model

LENGTH, READ, VOCABULARY = 14, 9, 11
TINY = ModelConfig(num_layers=1, model_dim=8, num_heads=2, mlp_dim=4, segment_length=4, chunk_length=2)


def check_settings() -> Config:
    words = ["--model.memory", "ungated", "--model.aggregation", "recent", "--model.top-k", "2"]
    chosen = parse(Config, words, program="mc-jax train")
    annealed = dataclasses.replace(chosen.training, top_k_anneal_steps=5)
    validate(dataclasses.replace(chosen, training=annealed))
    for changes in ({"top_k": None}, {"memory_depth": 2}, {"segmentation": "logarithmic"}):
        with pytest.raises(ConfigError, match=r"model\.(top_k|memory_depth|segmentation)"):
            validate(dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, **changes)))
    return validate(chosen)


def check_dial() -> None:
    assert parse(ModelDial, ["--aggregation", "recent"], program="mc-jax eval").aggregation == "recent"
    trained = Config(model=TINY, data=DataConfig(context_length=LENGTH), training=TrainingConfig())
    read = turned_config(trained, {"model.aggregation": "recent", "model.top_k": 2})
    assert turned_config(read, {"model.aggregation": "none"}).model.top_k is None


def check_plan(model: ModelConfig) -> None:
    sparse, average = (dataclasses.replace(model, aggregation=name) for name in ("sparse", "average"))
    assert cached_flops(model, 1024) == cached_flops(sparse, 1024), "top_k reads and a router's scores"
    assert cached_flops(model, 1024) > cached_flops(average, 1024), "the router costs nothing"
    assert memory_flops(model) == memory_flops(dataclasses.replace(model, memory="linear"))
    of_model, of_sparse = (memory_bytes(read, 1024, Storage(), 4) for read in (model, sparse))
    assert of_model == of_sparse, "pooled keys are kept too"


def check_core() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    q, k, v, u = (jax.random.normal(next(keys), (1, LENGTH, 2, 3)) / 2 for _ in range(4))

    @jax.jit
    def read() -> list[jax.Array]:
        given = {"step": jax.nn.sigmoid(q[..., 0]), "segment_length": 4, "chunk_length": 2}
        recent = {"memory": "ungated", "aggregation": "recent"}
        ways = ({"aggregation": "gated"}, recent | {"top_k": 99}, recent | {"top_k": 1})
        return [memory_caching(q, k, v, u, **given, **settings)[0] for settings in ways]

    gated, all_read, last_read = read()
    np.testing.assert_allclose(all_read, gated, rtol=1e-6, atol=1e-6)
    differ = np.abs(np.asarray(last_read - gated)).max(axis=(0, 2, 3)) > 1e-6
    assert list(differ) == [False] * 8 + [True] * 6, "from the third segment on a memory is not read"


def check_decoding(model: ModelConfig) -> None:
    graph, draw = drawing(Config(model=model), VOCABULARY)
    noise = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(noise.normal(0, 0.5, x.shape), x.dtype), jax.eval_shape(draw).parameters
    )
    tokens = noise.integers(0, VOCABULARY, (1, LENGTH), np.int32)

    def compiled(method):
        return jax.jit(lambda *given: method(merge_model(graph, state), *given))

    expected = compiled(lambda model, tokens: model(tokens))(tokens)
    prefill = compiled(lambda model, *given: model.prefill(*given, LENGTH))
    logits, caches = prefill(tokens[:, :READ], np.asarray([READ]))
    step = compiled(LanguageModel.step)
    for place in range(READ, LENGTH):
        np.testing.assert_allclose(logits, expected[:, place - 1], rtol=1e-4, atol=1e-5)
        logits, caches = step(tokens[:, place], caches)
    np.testing.assert_allclose(logits, expected[:, -1], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes to compiling
    assert mc_jax.__file__ is not None
    assert mc_jax.__file__.startswith(sys.argv[1]), f"this is {mc_jax.__file__}, and not the copy"
    check_settings()
    check_dial()
    model = dataclasses.replace(TINY, memory="ungated", aggregation="recent", top_k=2)
    check_plan(model)
    check_core()
    check_decoding(model)

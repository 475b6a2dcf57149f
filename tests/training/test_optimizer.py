"""Schedules, and Muon beside AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mc_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mc_jax.parallel import make_mesh
from mc_jax.training.checkpoint import Checkpoints, load_newest
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.run import abstract_state, new_state
from mc_jax.training.step import make_step

VOCABULARY = 20
TRAINING = TrainingConfig(steps=100, warmup_steps=10, learning_rate=1.0, batch_size=2)
CONFIG = Config(
    model=ModelConfig(num_layers=2, model_dim=16, num_heads=2, mlp_dim=24, segment_length=8, chunk_length=4),
    training=dataclasses.replace(TRAINING, optimizer="muon", learning_rate=1e-3),
)


def rates(**settings) -> list[float]:
    training = dataclasses.replace(TRAINING, **settings)
    return [learning_rate(training, step) for step in (0, 9, 10, 50, 79, 80, 90, 100)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [0.1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "wsd", "decay_steps": 20}, [0.1, 1, 1, 1, 1, 1, 0.5, 0]),
        (
            {"schedule": "wsd", "decay_steps": 20, "final_learning_rate": 0.2},
            [0.1, 1, 1, 1, 1, 1, 0.6, 0.2],
        ),
    ],
)
def test_a_schedule_gives_the_rates_that_it_should(settings, expected):
    np.testing.assert_allclose(rates(**settings), expected, rtol=1e-12)


def _batch():
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, VOCABULARY, jnp.int32)
    ids, mask = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": ids, "loss_mask": mask}


def test_one_compiled_step_serves_two_schedules_and_muon_learns():
    graph, state = new_state(CONFIG, VOCABULARY)
    step = make_step(graph, make_optimizer(CONFIG.training), 1)
    losses = []
    for settings in ({"schedule": "cosine"}, {"schedule": "wsd", "decay_steps": 50}):
        training = dataclasses.replace(CONFIG.training, learning_rate=0.02, warmup_steps=1, **settings)
        for count in range(5):
            state, metrics = step(state, _batch(), jnp.float32(learning_rate(training, count)))
            losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "another schedule compiled the step again"
    assert losses[-1] < 0.9 * losses[0]


def test_muon_makes_each_layers_wide_maps_orthogonal_and_leaves_the_rest_to_adam():
    _, state = new_state(CONFIG, VOCABULARY)
    training = dataclasses.replace(CONFIG.training, weight_decay=0.0)
    names = {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(state.optimizer[1].inner_states["muon"])
        for path in [[key for key in path if isinstance(key, jax.tree_util.DictKey)]]
        if path
    }
    mixer = "query key value router_query router_key output_gate output"
    expected = {f"blocks_0.mixer.{name}.kernel" for name in mixer.split()}
    expected |= {f"blocks_0.mlp.{name}.kernel" for name in ("gate", "input", "output")}
    assert set(names) == expected

    leaves, tree = jax.tree.flatten(state.parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    shapes = zip(keys, leaves, strict=True)
    gradients = jax.tree.unflatten(tree, [jax.random.normal(key, leaf.shape) for key, leaf in shapes])
    optimizer = make_optimizer(training)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(state.parameters), state.parameters)
    for layer in updates["blocks_0"]["mlp"]["gate"]["kernel"]:
        # Five Newton-Schulz steps bring singular values to about 1; the largest dimension is 24.
        sizes = jnp.linalg.svd(layer, compute_uv=False) / (0.2 * 24**0.5)
        assert jnp.all((sizes > 0.5) & (sizes < 1.5)), f"singular values {sizes}"
    np.testing.assert_allclose(jnp.abs(updates["embedding"]), 1.0, rtol=1e-2)


def test_muons_state_is_divided_as_its_parameters_and_survives_a_checkpoint(tmp_path):
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        _, state = new_state(CONFIG, VOCABULARY)
        muon = state.optimizer[1].inner_states["muon"].inner_state[0]
        kernel = muon.mu["blocks_0"]["mlp"]["gate"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 16 // 4, 24 // 2)
        with Checkpoints(epath.Path(tmp_path)) as checkpoints:
            checkpoints.restore(state)
            checkpoints.save(1, state, {"loss": jnp.float32(1.0)})
        loaded = load_newest(epath.Path(tmp_path), abstract_state(CONFIG, VOCABULARY)[1])
    assert loaded is not None
    read = loaded.state
    assert jax.tree.structure(read) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)

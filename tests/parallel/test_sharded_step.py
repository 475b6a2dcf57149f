"""A step on a mesh is the step on one device: gradients and losses, for all memories and aggregations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig, validate
from mc_jax.parallel import make_mesh, on_mesh
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.run import new_state
from mc_jax.training.step import make_step, merge_model, token_losses

VOCABULARY = 30
ROWS, LENGTH = 8, 20
ONE = MeshConfig(replica=1, fsdp=1)
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 4, tensor 2": MeshConfig(fsdp=4, tensor=2),
    "replica 2, fsdp 2, tensor 2": MeshConfig(replica=2, fsdp=2, tensor=2),
}
MODELS = {
    "linear, none": {"memory": "linear", "aggregation": "none"},
    "linear, residual": {"memory": "linear", "aggregation": "residual"},
    "linear, gated": {"memory": "linear", "aggregation": "gated"},
    "linear, average": {"memory": "linear", "aggregation": "average", "top_k": 1},
    "linear, independent": {"memory": "linear", "segment_init": "independent"},
    "swla, gated": {"memory": "swla", "aggregation": "gated"},
    "delta, sparse": {"memory": "delta", "aggregation": "sparse", "top_k": 2},
    "dla, soup": {"memory": "dla", "memory_depth": 2, "aggregation": "soup"},
    "titans matrix, gated": {"memory": "titans", "memory_depth": 1, "aggregation": "gated"},
    "titans, sparse": {"memory": "titans", "memory_depth": 2, "aggregation": "sparse", "top_k": 1},
    "attention": {"layer_pattern": ("memory", "attention"), "tie_embeddings": False},
}


def config_of(model: dict, **training) -> Config:
    return validate(
        Config(
            model=ModelConfig(
                **{"num_layers": 2, "model_dim": 16, "num_heads": 2, "mlp_dim": 24, "segment_length": 8}
                | {"chunk_length": 4, "aggregation": "gated"}
                | model
            ),
            data=DataConfig(context_length=LENGTH),
            training=TrainingConfig(
                **{"steps": 20, "batch_size": ROWS, "warmup_steps": 5, "learning_rate": 3e-3} | training
            ),
        )
    )


def batch_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[3, 15:] = 0.0
    starts = rng.integers(1, LENGTH, (ROWS, 1))
    ids = (np.arange(LENGTH)[None] >= starts).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": ids, "loss_mask": mask}


def mesh_of(sizes: MeshConfig) -> jax.sharding.Mesh:
    return make_mesh(sizes, jax.devices()[:1] if sizes == ONE else None)


def first_gradients(config: Config, sizes: MeshConfig) -> dict[str, np.ndarray]:
    with jax.set_mesh(mesh_of(sizes)):
        graph, state = new_state(config, VOCABULARY)

        @jax.jit
        def gradients(parameters, batch):
            def loss(p):
                return jnp.mean(token_losses(merge_model(graph, p), batch))

            return jax.grad(loss)(parameters)

        found = gradients(state.parameters, on_mesh(batch_of(0), ROWS))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)}


@functools.cache
def alone(name: str) -> dict[str, np.ndarray]:
    return first_gradients(config_of(MODELS[name]), ONE)


def must_agree(name: str, sizes: MeshConfig):
    found = first_gradients(config_of(MODELS[name]), sizes)
    errors = {path: np.linalg.norm(found[path] - expected) for path, expected in alone(name).items()}
    norms = {path: np.linalg.norm(expected) for path, expected in alone(name).items()}
    error = np.linalg.norm(list(errors.values())) / np.linalg.norm(list(norms.values()))
    assert error < 1e-5, f"the gradient is off by {error:.1e} of its norm"
    # Sums that nearly cancel, as those of a norm's scale, lose a digit of float32.
    wrong = {path: float(errors[path] / norms[path]) for path in errors if errors[path] > 1e-4 * norms[path]}
    assert not wrong, f"a sum over devices is missing, or is taken twice: relative errors {wrong}"


@pytest.mark.parametrize("name", MODELS)
def test_first_gradients_on_eight_devices_are_those_on_one(name):
    must_agree(name, MESHES["replica 2, fsdp 2, tensor 2"])


@pytest.mark.parametrize("mesh", list(MESHES)[:2])
@pytest.mark.parametrize("name", ["linear, gated", "titans, sparse"])
def test_first_gradients_are_the_same_on_every_mesh(name, mesh):
    must_agree(name, MESHES[mesh])


def losses(config: Config, sizes: MeshConfig, steps: int) -> list[float]:
    with jax.set_mesh(mesh_of(sizes)):
        graph, state = new_state(config, VOCABULARY)
        step = make_step(graph, make_optimizer(config.training), config.training.accumulation)
        found = []
        for count in range(steps):
            rate = jnp.float32(learning_rate(config.training, count))
            state, metrics = step(state, on_mesh(batch_of(count), ROWS), rate)
            found.append(float(metrics["loss"]))
        assert step._cache_size() == 1, "the state comes out laid out otherwise than it went in"
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_losses_on_a_mesh_are_those_on_one_device(mesh):
    config = config_of(MODELS["linear, gated"])
    np.testing.assert_allclose(losses(config, MESHES[mesh], 20), losses(config, ONE, 20), rtol=1e-4)


def test_parts_of_a_batch_are_spread_over_all_devices():
    config = config_of(MODELS["linear, gated"], accumulation=2)
    whole = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulation=1))
    np.testing.assert_allclose(
        losses(config, MESHES["fsdp 4, tensor 2"], 4), losses(whole, ONE, 4), rtol=1e-5
    )


def test_weights_and_moments_are_divided_among_all_devices_that_share_them():
    config = config_of(MODELS["linear, gated"])
    with jax.set_mesh(mesh_of(MESHES["fsdp 4, tensor 2"])):
        _, state = new_state(config, VOCABULARY)
    kernel = state.parameters["blocks_0"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16 // 4, 24 // 2)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
    total = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert held < total / 4, f"a device holds {held} of {total} numbers; eight share them"

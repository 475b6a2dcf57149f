"""A step on a mesh is the step on one device: gradients and losses, for all memories and aggregations."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tpu_topology import four

from mc_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    Remat,
    TrainingConfig,
    document_alignment,
    validate,
)
from mc_jax.parallel import make_mesh, on_mesh
from mc_jax.training.checkpoint import Checkpoints
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.run import abstract_state, new_state
from mc_jax.training.step import make_step, merge_model, token_losses

VOCABULARY = 30
ROWS, LENGTH = 8, 20
_ROUNDINGS = 20
ONE = MeshConfig(replica=1, fsdp=1)
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 4, tensor 2": MeshConfig(fsdp=4, tensor=2),
    "replica 2, fsdp 2, tensor 2": MeshConfig(replica=2, fsdp=2, tensor=2),
}
MODELS = {
    "linear, none": {"memory": "linear", "aggregation": "none"},
    "linear, gated": {"memory": "linear", "aggregation": "gated"},
    "linear, independent": {"memory": "linear", "segment_init": "independent", "aggregation": "residual"},
    "swla, null": {"memory": "swla", "aggregation": "null", "router_dim": 3},
    "delta, sparse": {"memory": "delta", "aggregation": "sparse", "top_k": 2},
    "dla, soup": {"memory": "dla", "memory_depth": 2, "aggregation": "soup"},
    "titans matrix": {"memory": "titans", "memory_depth": 1, "aggregation": "average", "top_k": 1},
    "titans, sparse": {"memory": "titans", "memory_depth": 2, "aggregation": "sparse", "top_k": 1},
    "attention": {"layer_pattern": ("memory", "attention"), "tie_embeddings": False},
}


def config_of(model: dict, *, context_length: int = LENGTH, **training) -> Config:
    return validate(
        Config(
            model=ModelConfig(
                **{"num_layers": 2, "model_dim": 16, "num_heads": 2, "mlp_dim": 24, "segment_length": 8}
                | {"chunk_length": 4, "aggregation": "gated"}
                | model
            ),
            data=DataConfig(context_length=context_length),
            training=TrainingConfig(
                **{"steps": 20, "batch_size": ROWS, "warmup_steps": 5, "learning_rate": 3e-3} | training
            ),
        )
    )


def batch_of(seed: int, config: Config) -> dict[str, np.ndarray]:
    rng, length = np.random.default_rng(seed), config.data.context_length
    tokens = rng.integers(0, VOCABULARY, (ROWS, length + 1), dtype=np.int32)
    mask = np.ones((ROWS, length), np.float32)
    mask[3, 15:] = 0.0
    starts = rng.integers(1, length, (ROWS, 1))
    starts -= starts % document_alignment(config.model)
    ids = (np.arange(length)[None] >= starts).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": ids, "loss_mask": mask}


def mesh_of(sizes: MeshConfig) -> jax.sharding.Mesh:
    return make_mesh(sizes, jax.devices()[:1] if sizes == ONE else None)


def nudged(parameters):
    """The numbers next to them, up or down by chance."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * (1 + np.float32(2**-23) * rng.choice(np.float32([-1, 1]), x.shape)), parameters
    )


@functools.cache
def drawn(config: Config):
    """The first parameters, on the host: drawing them is compiled once, not for every mesh."""
    with jax.set_mesh(mesh_of(ONE)):
        return jax.device_get(new_state(config, VOCABULARY)[1].parameters)


def first_gradients(
    config: Config, sizes: MeshConfig, change=lambda x: x, remat: Remat = "none"
) -> dict[str, np.ndarray]:
    with jax.set_mesh(mesh_of(sizes)):
        graph, like = abstract_state(config, VOCABULARY)
        where = jax.tree.map(lambda x: x.sharding, like.parameters)
        parameters = jax.device_put(change(drawn(config)), where)

        @jax.jit
        def gradients(parameters, batch):
            def loss(p):
                return jnp.mean(token_losses(merge_model(graph, p), batch, remat=remat))

            return jax.grad(loss)(parameters)

        batch = on_mesh(batch_of(0, config), ROWS)
        found = gradients(parameters, batch)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)}


@functools.cache
def alone(name: str, length: int) -> dict[str, np.ndarray]:
    return first_gradients(config_of(MODELS[name], context_length=length), ONE)


@functools.cache
def rounding(name: str, length: int) -> dict[str, np.floating]:
    """How far a gradient moves if weights move by their last bit: where that is much, none is exact."""
    config, here = config_of(MODELS[name], context_length=length), alone(name, length)
    other = first_gradients(config, ONE, nudged)
    return {path: np.linalg.norm(other[path] - here[path]) for path in here}


def must_agree(
    name: str, sizes: MeshConfig, *, length: int = LENGTH, most: float = 1.5e-5, remat: Remat = "none"
):
    found = first_gradients(config_of(MODELS[name], context_length=length), sizes, remat=remat)
    errors = {path: np.linalg.norm(found[path] - expected) for path, expected in alone(name, length).items()}
    norms = {path: np.linalg.norm(expected) for path, expected in alone(name, length).items()}
    norm = np.linalg.norm(list(norms.values()))
    error = np.linalg.norm(list(errors.values()))
    if error > most * norm:
        # Processors round differently. A step rounds many times, and each may count as much as this one.
        most = max(most, _ROUNDINGS * np.linalg.norm(list(rounding(name, length).values())) / norm)
    assert error < most * norm, f"the gradient is off by {error / norm:.1e} of its norm, and not {most:.1e}"
    # Sums that nearly cancel, as those of a norm's scale, lose a digit of float32.
    wrong = [path for path in errors if errors[path] > 1e-4 * norms[path]]
    wrong = [path for path in wrong if errors[path] > _ROUNDINGS * rounding(name, length)[path]]
    assert not wrong, f"a sum over devices is missing, or is taken twice: {wrong}"


def on_one_worker(names):
    """What tests of a model share is computed once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.mark.parametrize("name", on_one_worker(MODELS))
def test_first_gradients_on_eight_devices_are_those_on_one(name):
    must_agree(name, MESHES["replica 2, fsdp 2, tensor 2"])


@pytest.mark.parametrize("mesh", list(MESHES)[:2])
@pytest.mark.parametrize("name", on_one_worker(["titans, sparse"]))
def test_first_gradients_are_the_same_on_every_mesh(name, mesh):
    must_agree(name, MESHES[mesh])


def losses(
    config: Config, sizes: MeshConfig, steps: int, *, folder=None, start: int = 0, save: int | None = None
) -> list[float]:
    """Of `steps` steps, from the checkpoint of step `start` on, if it is not 0; `save` a step's state."""
    with jax.set_mesh(mesh_of(sizes)), contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder)) if folder else None
        if checkpoints and start:
            graph, like = abstract_state(config, VOCABULARY)
            loaded = checkpoints.restore(like)
            assert loaded is not None
            assert loaded.step == start
            state = loaded.state
        else:
            graph, state = new_state(config, VOCABULARY)
            if checkpoints:
                assert checkpoints.restore(state) is None
        step = make_step(graph, make_optimizer(config.training), config.training.accumulation)
        found = []
        for count in range(start, start + steps):
            rate = jnp.float32(learning_rate(config.training, count))
            state, metrics = step(state, on_mesh(batch_of(count, config), ROWS), rate)
            found.append(float(metrics["loss"]))
            if checkpoints and count + 1 == save:
                checkpoints.save(save, state, metrics)
        assert step._cache_size() == 1, "the state comes out laid out otherwise than it went in"
    return found


def test_a_run_goes_on_on_another_mesh(tmp_path):
    config = config_of(MODELS["linear, gated"])
    folder = epath.Path(tmp_path)
    expected = losses(config, MESHES["fsdp 8"], 6, folder=folder, save=3)[3:]
    found = losses(config, MESHES["replica 2, fsdp 2, tensor 2"], 3, folder=folder, start=3)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=5e-3)


def test_twenty_losses_on_a_mesh_are_those_on_one_device():
    # With a larger rate Adam soon blows up rounding, where a gradient is nearly zero. The other meshes take
    # some steps in the tests before and after this one.
    config = config_of(MODELS["linear, gated"], learning_rate=3e-4)
    found = losses(config, MESHES["replica 2, fsdp 2, tensor 2"], 20)
    np.testing.assert_allclose(found, losses(config, ONE, 20), rtol=1e-4)


def test_parts_of_a_batch_are_spread_over_all_devices():
    config = config_of(MODELS["linear, gated"], accumulation=2)
    whole = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulation=1))
    np.testing.assert_allclose(
        losses(config, MESHES["fsdp 4, tensor 2"], 3), losses(whole, ONE, 3), rtol=1e-5
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


@pytest.mark.usefixtures("quick_tpu_compiler")
@pytest.mark.parametrize("memory", ["linear", "delta", "titans"])
def test_a_step_for_four_tpus_runs_the_kernels_on_its_rows_and_heads(programs, memory):
    depth = {"memory_depth": 1} if memory == "titans" else {}
    model = {"memory": memory, **depth, "model_dim": 512, "num_heads": 4, "mlp_dim": 512}
    model |= {"segment_length": 256, "chunk_length": 64, "aggregation": "gated"}
    config = config_of(model, context_length=512)
    rows = jax.ShapeDtypeStruct((ROWS, 512), jnp.int32)
    mesh = make_mesh(MeshConfig(tensor=2), four("v5e"))
    with jax.set_mesh(mesh):
        graph, state = abstract_state(config, VOCABULARY)
        step = make_step(graph, make_optimizer(config.training), accumulation=1)
        batch = dict.fromkeys(("inputs", "targets", "document_ids"), rows)
        batch["loss_mask"] = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        laid = jax.NamedSharding(mesh, jax.P(("replica", "fsdp")))
        batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid) for k, x in batch.items()}
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        found = programs.compiled(step.lower(state, batch, rate))["kernels"]
    for kernel in (f"{memory}_memory", f"{memory}_memory_backward", "state_read", "state_read_backward"):
        assert kernel in found, f"{kernel} is not in the program"

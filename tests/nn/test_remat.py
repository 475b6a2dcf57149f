"""What blocks save for their gradient changes its memory, and no number."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tpu_topology import four

from mc_jax.config import ModelConfig
from mc_jax.nn import LanguageModel
from mc_jax.training.step import merge_model, split_model, token_losses

VOCABULARY, LENGTH = 20, 128


def config_of(**model) -> ModelConfig:
    small = {"num_layers": 4, "model_dim": 16, "num_heads": 2, "mlp_dim": 24}
    return ModelConfig(**small | {"segment_length": 8, "chunk_length": 4} | model)


def gradient_of(config: ModelConfig, dtype=jnp.float32):
    """The gradient's function of parameters, batch and (static) remat, and what draws parameters."""

    def build():
        return LanguageModel(config, VOCABULARY, dtype=dtype, rngs=nnx.Rngs(params=0))

    graph = nnx.graphdef(nnx.eval_shape(build))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(parameters, batch, remat):
        return jax.grad(lambda p: jnp.mean(token_losses(merge_model(graph, p), batch, remat=remat)))(
            parameters
        )

    return gradient, lambda: split_model(build())[1]


def batch_of(rows: int, length: int):
    tokens = jax.random.randint(jax.random.key(0), (rows, length + 1), 0, VOCABULARY, jnp.int32)
    ids, mask = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "document_ids": ids, "loss_mask": mask}


def must_agree(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Rounding alone: 1.2e-5 was the most.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


@pytest.fixture(scope="module")
def gated():
    """Programs by what they save, and the gradient of each."""
    gradient, draw = gradient_of(config_of(aggregation="gated"))
    parameters, batch = draw(), batch_of(4, LENGTH)
    compiled = {
        remat: gradient.lower(parameters, batch, remat).compile()
        for remat in ("none", "maps", "states", "blocks", "offload")
    }
    return compiled, {remat: program(parameters, batch) for remat, program in compiled.items()}


def test_gradients_are_the_same_whatever_is_saved(gated):
    _, gradients = gated
    for remat in ("maps", "states", "blocks", "offload"):
        must_agree(gradients[remat], gradients["none"])


def test_each_way_holds_less_than_the_one_before(gated):
    programs, _ = gated
    held = {name: programs[name].memory_analysis().temp_size_in_bytes for name in programs}
    del held["offload"]  # on a CPU the host's memory is the device's
    assert [*held.values()] == sorted(set(held.values()), reverse=True), f"bytes held: {held}"


def kernels(config: ModelConfig, remat: str) -> dict[str, int]:
    """How often each kernel is called in the gradient's program for a TPU, which is not compiled."""
    chip = jax.sharding.Mesh([four("v5e")[0]], "chip", axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(chip):
        gradient, draw = gradient_of(config, jnp.bfloat16)
        where = jax.NamedSharding(chip, jax.P())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            (jax.eval_shape(draw), jax.eval_shape(lambda: batch_of(2, 512))),
        )
        text = gradient.lower(*shapes, remat).as_text()
    return collections.Counter(re.findall(r'kernel_name = "(\w+)"', text))


@pytest.mark.parametrize("memory", ["linear", "delta", "titans"])
def test_states_runs_no_matrix_memory_twice(memory):
    """Of an MLP just reads are saved: its states are so large that keeping them takes longer than a run."""
    depth = {"memory_depth": 2} if memory == "titans" else {}
    sizes = {
        "model_dim": 256,
        "num_heads": 2,
        "segment_length": 256,
        "chunk_length": 64,
        "aggregation": "gated",
    }
    config = config_of(memory=memory, **depth, **sizes)
    run = "deep_memory" if memory == "titans" else f"{memory}_memory"
    count = {remat: kernels(config, remat) for remat in ("none", "states", "blocks")}
    assert count["none"][run] == 1, f"the program has {count['none']}"
    for found in count.values():  # as quick as reading what it would have saved
        del found["short_convolution"]
    expected = count["none"] | ({run: 2} if memory == "titans" else {})
    assert count["states"] == expected, "what is saved is computed again"
    assert count["blocks"][run] == 2, "nothing was saved, so it must run again"

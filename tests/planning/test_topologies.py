"""The training step of every family of recipes compiles for pods and slices; here it has a layer or two."""

import importlib.util

import pytest

from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mc_jax.planning.plan import plan

CASES = [
    ("v6e:2x2", 2, {"layer_pattern": ("attention",), "tie_embeddings": False}, "blocks"),
]
SLOW = [
    ("v5p:4x4x4", 1, {"memory": "linear", "aggregation": "sparse", "top_k": 2}, "states"),
    ("v6e:16x16", 1, {"memory": "swla", "aggregation": "none"}, "none"),
    ("tpu7x:2x2x2", 2, {"memory": "titans", "memory_depth": 2, "aggregation": "gated"}, "maps"),
    ("v5e:4x4", 1, {"memory": "dla", "memory_depth": 2, "aggregation": "soup", "num_layers": 2}, "offload"),
]


@pytest.mark.usefixtures("quick_tpu_compiler")
@pytest.mark.parametrize(
    ("topology", "slices", "model", "remat"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_shallow_step_compiles_and_fits(topology, slices, model, remat):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed: uv sync --group aot")
    chips = 256 if "16x16" in topology else 64 * slices
    config = Config(
        model=ModelConfig(
            **{"num_layers": 1, "model_dim": 256, "num_heads": 2, "mlp_dim": 256, "aggregation": "none"}
            | model
        ),
        data=DataConfig(context_length=512),
        training=TrainingConfig(batch_size=chips, remat=remat),
    )
    found = plan(config, topology=topology, slices=slices, vocab_size=512, estimate=False)
    assert found.memory.fits
    assert (found.memory.host > 0) == (remat == "offload")
    assert found.mesh["replica"] == slices, "copies of the state, and nothing else, lie on several slices"
    inside = [one for one in found.collectives if not one.network]
    assert {axis for one in inside for axis in one.axes} == {"fsdp"}
    between = [one for one in found.collectives if one.network]
    assert {axis for one in between for axis in one.axes} == ({"replica"} if slices > 1 else set())
    if slices > 1:
        gradients = sum(one.times * one.bytes for one in between)
        # A chip's share of all gradients, in bfloat16, or float32 as those of the embedding.
        share = 2 * sum(found.parameters.values()) / (found.chips / slices)
        assert share <= gradients <= 2 * share
    assert all(one.seconds > 0 for one in found.collectives if one.bytes)

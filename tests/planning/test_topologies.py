"""The training step of every family of recipes compiles for pods and slices; here it has a layer or two."""

import math

import pytest
from planned_step import lowered_step

from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mc_jax.planning import _sendings, collectives, memory, plan, program, topology

CASES = [
    ("v6e:2x2", 2, {"layer_pattern": ("attention",), "tie_embeddings": False}, "blocks"),
    ("v5p:4x4x4", 1, {"memory": "linear", "aggregation": "sparse", "top_k": 2}, "states"),
    ("v6e:16x16", 1, {"memory": "swla", "aggregation": "none"}, "none"),
    ("tpu7x:2x2x2", 2, {"memory": "titans", "memory_depth": 2, "aggregation": "gated"}, "maps"),
    ("v5e:4x4", 1, {"memory": "dla", "memory_depth": 2, "aggregation": "soup", "num_layers": 2}, "offload"),
]


@pytest.mark.usefixtures("quick_tpu_compiler")
@pytest.mark.parametrize(
    ("pod", "slices", "model", "remat"),
    CASES,
)
def test_a_shallow_step_compiles_and_fits(programs, pod, slices, model, remat):
    chips = 256 if "16x16" in pod else 64 * slices
    config = Config(
        model=ModelConfig(
            **{"num_layers": 1, "model_dim": 256, "num_heads": 2, "mlp_dim": 256, "aggregation": "none"}
            | model
        ),
        data=DataConfig(context_length=512),
        training=TrainingConfig(batch_size=chips, remat=remat),
    )

    def planned():
        made = plan(config, topology=pod, slices=slices, vocab_size=512, estimate=False)
        sent = [(one.axes, one.network, one.times * one.bytes, one.seconds) for one in made.collectives]
        return {
            "free": made.memory.free,
            "host": made.memory.host,
            "mesh": made.mesh,
            "parameters": sum(made.parameters.values()),
            "sent": sent,
        }

    step = lowered_step(config, pod, slices, vocabulary=512)
    found = programs.compiled(step, planned, [plan, memory, topology, collectives, program, _sendings])
    assert found["free"] > 0
    assert (found["host"] > 0) == (remat == "offload")
    assert found["mesh"]["replica"] == slices, "copies of the state, and nothing else, lie on several slices"
    axes = [
        {axis for axes, network, *_ in found["sent"] if network == between for axis in axes}
        for between in (False, True)
    ]
    assert axes == [{"fsdp"}, {"replica"} if slices > 1 else set()]
    if slices > 1:
        gradients = sum(sent for _, network, sent, _ in found["sent"] if network)
        # A chip's share of all gradients, in bfloat16, or float32 as those of the embedding.
        share = 2 * found["parameters"] / (math.prod(found["mesh"].values()) / slices)
        assert share <= gradients <= 2 * share
    assert all(seconds > 0 for *_, sent, seconds in found["sent"] if sent)

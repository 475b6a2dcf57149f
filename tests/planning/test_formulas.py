"""FLOPs by formula are what one counts by hand."""

import dataclasses

import jax
import pytest

from mc_jax.caching import Storage
from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig, validate
from mc_jax.evaluation.sweep.cost import memory_bytes
from mc_jax.planning.formulas import (
    cached_flops,
    flops_of,
    mean_eligible,
    mean_groups,
    mean_seen,
    memory_flops,
)
from mc_jax.planning.parts import by_part
from mc_jax.training.run import drawing

VOCABULARY, DIM, HEADS, MLP, LAYERS, LENGTH = 50, 16, 2, 24, 2, 32


def config_of(**model) -> Config:
    sizes = {"num_layers": LAYERS, "model_dim": DIM, "num_heads": HEADS, "mlp_dim": MLP}
    return validate(
        Config(
            model=ModelConfig(**sizes | {"segment_length": 8, "chunk_length": 4} | model),
            data=DataConfig(context_length=LENGTH),
            training=TrainingConfig(batch_size=3),
        )
    )


def parameters_of(config: Config):
    return jax.eval_shape(drawing(config, VOCABULARY)[1]).parameters


def test_attention_is_six_times_its_matrices_and_the_causal_half():
    config = config_of(layer_pattern=("attention",), tie_embeddings=False)
    parameters = parameters_of(config)
    flops = flops_of(config, parameters)
    matrices = LAYERS * (4 * DIM * DIM + 3 * DIM * MLP) + DIM * VOCABULARY
    # Scores and values of (1 + 2 + ... + 32) / 32 tokens.
    attention = LAYERS * 4 * DIM * 16.5
    assert flops.token == 6 * matrices + 3 * attention
    assert flops.step == 3 * LENGTH * flops.token
    assert by_part(parameters, config.model) == {
        "embedding": VOCABULARY * DIM,
        "mixer (attention)": LAYERS * 4 * DIM * DIM,
        "MLP": LAYERS * 3 * DIM * MLP,
        "norms": (2 * LAYERS + 1) * DIM,
        "output map": DIM * VOCABULARY,
    }


def test_gated_reads_count_all_eligible_memories_and_their_scores():
    config = config_of(aggregation="gated")
    flops = flops_of(config, parameters_of(config))
    k = DIM // HEADS
    # Segments of 8 in 32 tokens: 0, 1, 2 and 3 before a token.
    assert flops.cached_reads == LAYERS * HEADS * 1.5 * (2 * k * k + 2 * k)
    assert flops.memories == LAYERS * HEADS * (4 * k * k + 2 * 4 * 2 * k)
    maps = 5 * DIM * DIM + HEADS * DIM  # q, k, v, gate and output; retention or step
    assert flops.maps["router"] == 2 * LAYERS * (2 * DIM * DIM + HEADS * DIM)
    assert flops.maps["mixer (linear)"] >= 2 * LAYERS * maps
    assert flops.maps["output map"] == 2 * DIM * VOCABULARY, "a tied embedding is the output map"


def test_sparse_reads_count_top_k_and_scores_of_all():
    k = DIM // HEADS
    model = config_of(aggregation="sparse", top_k=2).model
    assert mean_eligible(LENGTH, 8, 2) == (0 + 1 + 2 + 2) / 4
    assert cached_flops(model, LENGTH) == 1.25 * 2 * k * k + 1.5 * 2 * k
    assert cached_flops(dataclasses.replace(model, aggregation="none"), LENGTH) == 0


def test_a_router_has_its_own_width_in_maps_scores_and_cache_and_scores_each_block():
    config = config_of(aggregation="null", router_dim=3, router_blocks=2)
    flops, k = flops_of(config, parameters_of(config)), DIM // HEADS
    assert flops.maps["router"] == 2 * LAYERS * (2 * DIM * HEADS * 3 + HEADS * DIM), "two maps and a logit's"
    assert flops.cached_reads == LAYERS * HEADS * 1.5 * (2 * k * k + 2 * 2 * 3)
    kept = memory_bytes(config.model, LENGTH, Storage(), number_bytes=2)
    assert kept == LAYERS * HEADS * 2 * (k * k + LENGTH // 8 * (k * k + 2 * 3))


def test_an_unfinished_segment_counts_its_tokens():
    assert mean_eligible(10, 4, None) == (4 * 0 + 4 * 1 + 2 * 2) / 10


@pytest.mark.parametrize(
    ("model", "products"),
    [
        # What is written and read, in units of 2 K V or 2 K E; without pairs of tokens.
        ({"memory": "linear"}, 2),
        ({"memory": "delta"}, 3),
        ({"memory": "titans", "memory_depth": 1}, 3),
        ({"memory": "dla", "memory_depth": 2, "memory_branch": "plain"}, 6),
        ({"memory": "dla", "memory_depth": 2}, 7),
        ({"memory": "titans", "memory_depth": 2}, 7),
    ],
)
def test_a_memory_counts_its_writes_its_read_and_its_errors(model, products):
    k = DIM // HEADS
    found = memory_flops(config_of(**model).model)
    if model.get("memory_depth") == 2:
        pairs = 2 * (2 * 4 * (k + 4 * k))
        assert found == products * 2 * k * 4 * k + pairs
    else:
        assert found == products * 2 * k * k + 2 * 4 * 2 * k


def test_a_window_is_full_but_for_the_first_tokens():
    assert mean_seen(6, 3) == (1 + 2 + 3 + 3 + 3 + 3) / 6
    assert mean_seen(6, 100) == mean_seen(6, None) == 3.5


def test_groups_of_segments_and_few_places_are_read_as_one_counts_them():
    assert mean_groups(LENGTH, 8) == (0 + 1 + 1 + 2) / 4, "0, 1, 2 = 10b and 3 = 11b segments before"
    model = config_of(segmentation="logarithmic").model
    k = DIM // HEADS
    assert cached_flops(model, LENGTH) == 1 * 2 * k * k + 1.5 * 2 * k, "a group is a read, a segment a score"
    model = config_of().model
    assert cached_flops(model, LENGTH, places=1) == 0.75 * (2 * k * k + 2 * k)
    config = config_of()
    few, all_of_them = (flops_of(config, parameters_of(config), places=places) for places in (1, None))
    saved = LAYERS * HEADS * (cached_flops(model, LENGTH) - cached_flops(model, LENGTH, places=1))
    assert all_of_them.forward - few.forward == saved

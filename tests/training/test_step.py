import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mc_jax.training.optimizer import annealed_top_k, learning_rate, make_optimizer
from mc_jax.training.run import new_state
from mc_jax.training.step import make_step, merge_model, token_losses

pytestmark = pytest.mark.xdist_group("step")  # one worker: they share what is compiled

VOCABULARY = 23
CONFIG = Config(
    model=ModelConfig(num_layers=2, model_dim=16, num_heads=2, mlp_dim=24, segment_length=8, chunk_length=4),
    data=DataConfig(context_length=24),
    training=TrainingConfig(
        steps=30, batch_size=4, warmup_steps=5, learning_rate=3e-3, final_learning_rate=3e-4, seed=3
    ),
)


def _batch(seed=0, rows=4, length=24):
    tokens = jax.random.randint(jax.random.key(seed), (rows, length + 1), 0, VOCABULARY, jnp.int32)
    ids = jnp.broadcast_to((jnp.arange(length) >= 17).astype(jnp.int32)[None], (rows, length))
    mask = jnp.ones((rows, length), jnp.float32).at[0, 20:].set(0.0)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "document_ids": ids,
        "loss_mask": mask,
    }


@functools.cache
def _compiled(config):
    graph, _ = new_state(config, VOCABULARY)
    return graph, make_step(graph, make_optimizer(config.training), config.training.accumulation)


def _step(config):
    return (_compiled(config)[0], new_state(config, VOCABULARY)[1], _compiled(config)[1])


def test_loss_falls_along_the_golden_curve():
    _, state, step = _step(CONFIG)
    losses = []
    for count in range(8):
        state, metrics = step(state, _batch(), jnp.float32(learning_rate(CONFIG.training, count)))
        losses.append(float(metrics["loss"]))
    golden = GOLDEN_LOSSES
    np.testing.assert_allclose(
        losses[:: len(losses) // len(golden)],
        golden,
        rtol=2e-4,
        err_msg="the numbers of training changed; if that was meant, write the new losses here and say why",
    )


GOLDEN_LOSSES = [3.15383, 3.11406, 3.08171, 3.05529]


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    _, state, step = _step(CONFIG)
    parts = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, accumulation=4))
    _, other_state, accumulating = _step(parts)
    state, metrics = step(state, _batch(), jnp.float32(1e-3))
    other_state, other = accumulating(other_state, _batch(), jnp.float32(1e-3))
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], other["grad_norm"], rtol=1e-5)
    assert metrics["grad_norm"] > 0


def test_padding_has_no_part_in_the_loss():
    graph, state, step = _step(CONFIG)
    batch = _batch()
    logits = merge_model(graph, state.parameters)(batch["inputs"], batch["document_ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    expected = jnp.sum(losses * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])
    changed = {**batch, "targets": batch["targets"].at[0, 20:].set(0)}
    _, metrics = step(state, changed, jnp.float32(0.0))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_a_masked_token_counts_in_no_loss_even_where_it_is_nan():
    _, state, step = _step(CONFIG)
    batch = _batch()
    # From place 20 on row 0 is masked. An unknown target makes its loss NaN, an unknown input its features.
    unknown_target = {**batch, "targets": batch["targets"].at[0, 20].set(-100)}
    unknown_input = {**unknown_target, "inputs": batch["inputs"].at[0, 21].set(VOCABULARY)}
    state, expected = step(state, batch, jnp.float32(0.0))
    state, metrics = step(state, unknown_target, jnp.float32(0.0))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-4)
    # The gradient of maps within the network is NaN there, of the token's own features: the step is refused.
    graph, state, _ = _step(CONFIG)
    losses = jax.jit(lambda batch: token_losses(merge_model(graph, state.parameters), batch))(unknown_input)
    np.testing.assert_allclose(jnp.sum(losses) / jnp.sum(batch["loss_mask"]), expected["loss"], rtol=1e-6)
    seen = {**batch, "targets": batch["targets"].at[0, 19].set(VOCABULARY)}
    assert jnp.isnan(step(state, seen, jnp.float32(0.0))[1]["loss"]), "a target outside the vocabulary"


def test_a_change_of_schedule_compiles_nothing_anew():
    _, state, step = _step(CONFIG)
    sizes = []
    for rate in (1e-3, 1e-3, 5e-4, 0.0):
        state, _ = step(state, _batch(), jnp.float32(rate))
        sizes.append(step._cache_size())
    assert sizes[1] == sizes[-1], "a new rate compiled the step again"


def test_weight_decay_falls_on_matrices_alone():
    _, state = new_state(CONFIG, VOCABULARY)
    optimizer = make_optimizer(CONFIG.training)
    zeros = jax.tree.map(jnp.zeros_like, state.parameters)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, state.optimizer, state.parameters)
    decayed = {
        ".".join(key.key for key in path)
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.any(update)
    }
    assert "embedding" in decayed
    assert "blocks_0.mixer.query.kernel" in decayed
    assert "blocks_0.mlp.output.kernel" in decayed
    assert not [name for name in decayed if name.split(".")[-1] not in ("kernel", "embedding")]


@pytest.mark.parametrize(("step", "expected"), [(0, 6e-4), (4, 3e-3), (5, 3e-3), (30, 3e-4)])
def test_learning_rate_warms_up_and_ends_where_it_should(step, expected):
    np.testing.assert_allclose(learning_rate(CONFIG.training, step), expected, rtol=1e-9)


def test_learning_rate_falls_after_the_warm_up():
    rates = [learning_rate(CONFIG.training, step) for step in range(5, 31)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_annealed_top_k_falls_from_all_memories_of_a_row_to_its_own():
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, aggregation="sparse", top_k=1),
        data=DataConfig(context_length=64),
        training=dataclasses.replace(CONFIG.training, top_k_anneal_steps=10),
    )
    assert [annealed_top_k(config, step) for step in (0, 5, 10, 30)] == [8, 4, 1, 1]

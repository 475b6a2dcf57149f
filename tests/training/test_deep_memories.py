"""MLP memories stay finite whatever they read and however long, with fresh weights and with trained ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mc_jax.data.dataset import open_data
from mc_jax.data.pipeline import training_batches
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.run import new_state
from mc_jax.training.step import make_step, merge_model, token_losses

VOCABULARY, CONTEXT, TOKENS = 128, 256, 65_536
# Ruled tables: runs of one token, several chunks long, on which plain memories are NaN at the first step.
TABLE = (
    "Name          Town\n" + "=" * 380 + "\nHolm          Bergen\n" + "_" * 290 + "\nLie           Molde\n"
)
CONFIG = Config(
    model=ModelConfig(
        num_layers=1,
        model_dim=32,
        num_heads=2,
        mlp_dim=32,
        memory_depth=2,
        aggregation="none",
        segment_length=64,
        chunk_length=64,
    ),
    data=DataConfig(context_length=CONTEXT),
    training=TrainingConfig(steps=200, batch_size=2, learning_rate=8e-3, warmup_steps=20),
)


@functools.cache
def trained(memory: str):
    """Train on the table, see that every step is finite, and return the fresh and the trained model."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, memory=memory))
    graph, state = new_state(config, VOCABULARY)
    fresh = merge_model(graph, jax.tree.map(jnp.copy, state.parameters))
    step = make_step(graph, make_optimizer(config.training), 1)
    text = np.frombuffer(TABLE.encode(), np.uint8).astype(np.int32)
    ones = np.ones((config.training.batch_size, CONTEXT), np.float32)
    losses = []
    for count in range(config.training.steps):
        starts = count * 101 + 389 * np.arange(len(ones))
        rows = text[(starts[:, None] + np.arange(CONTEXT + 1)) % len(text)]
        batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "document_ids": 0 * rows[:, 1:]}
        batch |= {"loss_mask": ones}
        state, metrics = step(state, batch, jnp.float32(learning_rate(config.training, count)))
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert np.isfinite(losses).all(), f"step {np.argmin(np.isfinite(losses).all(axis=1)) + 1} is not finite"
    assert losses[-1][0] < 0.5 * losses[0][0], "it learned nothing"
    return fresh, merge_model(graph, state.parameters)


@functools.cache
def texts() -> dict[str, np.ndarray]:
    """Of `TOKENS` tokens each."""
    random = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS)
    one, two = np.full(TOKENS, ord("=")), np.resize([ord("="), ord("_")], TOKENS)
    padded = np.where(np.arange(TOKENS) < 1000, random, 0)
    return {"random": random, "repeated": one, "alternating": two, "padded": padded}


# Nearly all of it is compiling; test_deep_memory has both objectives at all gates.
@pytest.mark.parametrize("memory", ["titans", pytest.param("dla", marks=pytest.mark.slow)])
def test_features_of_any_text_are_finite_to_its_end(memory):
    rows = jnp.asarray(np.stack([*texts().values()]), jnp.int32)
    read = jax.jit(lambda model, rows: jnp.isfinite(model.features(rows)).all(axis=(1, 2)))
    for age, model in zip(("fresh", "trained"), trained(memory), strict=True):
        finite = dict(zip(texts(), np.asarray(read(model, rows)), strict=True))
        assert all(finite.values()), f"with {age} weights: {finite}"


def test_the_quickstart_with_an_mlp_memory_begins_with_finite_numbers():
    """Segments of one chunk and two layers, whose loop over one chunk XLA once turned into NaN."""
    recipe = quickstart.config()
    model = dataclasses.replace(recipe.model, memory="titans", memory_depth=2, aggregation="none")
    data = dataclasses.replace(recipe.data, tokenizer="bytes", vocab_size=None)
    config = dataclasses.replace(recipe, model=model, data=data)
    dataset = open_data(data)
    rows = config.training.batch_size
    batch = next(
        training_batches(
            dataset.train,
            context_length=data.context_length,
            batch_size=rows,
            seed=0,
            start_row=0,
            align=model.chunk_length,
            rows=range(rows),
        )
    )
    graph, state = new_state(config, dataset.tokenizer.vocab_size)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(parameters, batch):
        return jnp.mean(token_losses(merge_model(graph, parameters), batch))

    loss, gradient = loss_and_gradient(state.parameters, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

"""A part of the parameters is trained: the others stay as they are, and cost neither state nor gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import CONFIG, VOCABULARY, _batch

from mc_jax.config import TrainingConfig
from mc_jax.training import loop
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.patterns import trained_part
from mc_jax.training.run import new_state
from mc_jax.training.step import by_name, make_step

ROUTER = {f"blocks_0.mixer.{name}.kernel" for name in ("router_query", "router_key", "online_logit")}


def with_part(**training) -> TrainingConfig:
    return dataclasses.replace(CONFIG.training, **training)


def trained_by(settings, steps):
    """The state before and after some steps."""
    config = dataclasses.replace(CONFIG, training=settings)
    part = trained_part(settings)
    graph, state = new_state(config, VOCABULARY)
    before = jax.tree.map(np.asarray, state)
    step = make_step(graph, make_optimizer(settings), settings.accumulation, part=part)
    for count in range(steps):
        state, metrics = step(state, _batch(count), jnp.float32(1e-2), None)
        assert np.isfinite(metrics["loss"])
    return before, state


def test_frozen_parameters_stay_to_the_bit_and_have_no_state():
    settings = with_part(
        train=("router_*", "online_logit", "embedding"), freeze=("embedding",), accumulation=2
    )
    before, after = trained_by(settings, steps=100)
    then, now = by_name(before.parameters), by_name(after.parameters)
    assert then.keys() == now.keys()
    assert {name for name in now if not np.array_equal(now[name], then[name])} == ROUTER
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.optimizer))
    assert moments == 2 * sum(now[name].size for name in ROUTER) + 1, "two a trained number, and a count"


def test_what_lies_below_the_lowest_that_is_trained_is_not_gone_back_through():
    def products(settings):
        config = dataclasses.replace(CONFIG, training=settings)
        graph, state = new_state(config, VOCABULARY)
        step = make_step(graph, make_optimizer(settings), 1, part=trained_part(settings))
        cost = step.lower(state, _batch(), jnp.float32(1e-2), None).cost_analysis()
        return cost["flops"]

    whole, top = products(CONFIG.training), products(with_part(train=("norm.scale",), freeze=("blocks_0",)))
    assert top < 0.45 * whole, "a step backwards takes twice what one forwards does"


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"train": ("router",)}, "training.train router matches no parameter of the model"),
        ({"freeze": ("x*",)}, r"training\.freeze x\* matches no parameter of the model"),
        ({"train": ("norm",), "freeze": ("norm",)}, "training.freeze leaves nothing to train"),
    ],
)
def test_patterns_for_nothing_are_refused_before_anything_is_written(training, told, tmp_path):
    config = dataclasses.replace(CONFIG, training=with_part(batch_size=8, **training))
    with pytest.raises(ValueError, match=told):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Learning rates by part, beside optax's own optimizers at those rates."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from mc_jax.cli import main
from mc_jax.config import Config, ConfigError, ModelConfig, TrainingConfig, from_json, to_json, validate
from mc_jax.training import loop
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.step import by_name, from_names

RATE = 0.01
PLAIN = TrainingConfig(gradient_clip=1e9)
FACTORS = dataclasses.replace(PLAIN, learning_rate_factors=("router_query=10", "mlp.*=0.1"))
OF_PART = {"blocks_0.mixer.router_query.kernel": 10.0, "blocks_0.mlp.gate.kernel": 0.1}
SHAPES = {
    "blocks_0.mixer.router_query.kernel": (2, 4, 4),
    "blocks_0.mlp.gate.kernel": (2, 4, 6),
    "blocks_0.norm.scale": (2, 4),
    "embedding": (7, 4),
}


def drawn(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def after_two_steps(optimizer, named, rate):
    """The parameters after two steps, as the training's step moves them."""
    parameters = from_names(named)
    state = optimizer.init(parameters)
    with jax.numpy_dtype_promotion("standard"):
        for seed in (1, 2):
            updates, state = optimizer.update(
                from_names({name: drawn(seed)[name] for name in named}), state, parameters
            )
            parameters = jax.tree.map(lambda p, u: p - rate * u, parameters, updates)
    return by_name(parameters)


def test_a_part_moves_as_by_optax_at_its_own_rate_weight_decay_included():
    moved = after_two_steps(make_optimizer(FACTORS), drawn(0), RATE)
    for name, values in drawn(0).items():
        decay = 0.0 if name.endswith("scale") else PLAIN.weight_decay
        own = optax.adamw(-RATE * OF_PART.get(name, 1.0), b1=PLAIN.beta1, b2=PLAIN.beta2, weight_decay=decay)
        expected = after_two_steps(own, {name: values}, rate=1.0)[name]
        np.testing.assert_allclose(moved[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_muons_part_moves_by_its_factor_and_the_others_stay_as_they_were_to_the_bit():
    muon = dataclasses.replace(PLAIN, optimizer="muon")
    factors = dataclasses.replace(muon, learning_rate_factors=FACTORS.learning_rate_factors)
    assert jax.tree.structure(make_optimizer(factors).init(from_names(drawn(0)))) == jax.tree.structure(
        make_optimizer(muon).init(from_names(drawn(0)))
    ), "factors may change while a run goes on, so they must have no state"
    ours = after_two_steps(make_optimizer(factors), drawn(0), RATE)
    for name in SHAPES:
        rate = RATE * OF_PART.get(name, 1.0)
        same = after_two_steps(make_optimizer(muon), drawn(0), rate)[name]
        if name in OF_PART:
            np.testing.assert_allclose(ours[name], same, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], same, err_msg=name)


def test_the_setting_is_read_from_a_command_line_and_survives_json(monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train", lambda config, *_, **__: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart", "--training.learning-rate-factors", "router_query=10", "mlp=0.1"])
    (config,) = seen
    assert config.training.learning_rate_factors == ("router_query=10", "mlp=0.1")
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("entry", ["mlp", "=2", "mlp=-1", "mlp=nan", "mlp=inf", "mlp=x"])
def test_what_is_no_factor_is_refused(entry):
    training = dataclasses.replace(PLAIN, learning_rate_factors=(entry,))
    with pytest.raises(ConfigError, match="write PATTERN=FACTOR with a factor above 0"):
        validate(Config(training=training))


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"learning_rate_factors": ("router=2",)}, "router matches no parameter that is trained"),
        (
            {"learning_rate_factors": ("mlp=2",), "freeze": ("mlp",)},
            "learning_rate_factors mlp matches no parameter that is trained",
        ),
        (
            {"learning_rate_factors": ("mlp=2", "*.gate=3")},
            r"mlp and \*\.gate both match blocks_0\.mlp\.gate\.kernel; make one of them narrower",
        ),
    ],
)
def test_patterns_for_nothing_or_for_the_same_are_refused_before_anything_is_written(
    training, told, tmp_path
):
    model = ModelConfig(num_layers=1, model_dim=16, num_heads=2, mlp_dim=24, segment_length=8, chunk_length=4)
    config = Config(model=model, training=dataclasses.replace(PLAIN, **training))
    with pytest.raises(ValueError, match=told):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""What is told of memories and aggregations is so, and told of all of them."""

import dataclasses
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax import memory_caching
from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.config import (
    AggregationName,
    Config,
    ConfigError,
    MemoryName,
    ModelConfig,
    TrainingConfig,
    validate,
)
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS, AggregationFacts
from mc_jax.memories import MEMORIES

ROOT = Path(__file__).resolve().parents[1]


def test_every_memory_and_aggregation_has_functions_and_facts():
    for functions, facts, where in (
        (MEMORIES, MEMORY_FACTS, "MEMORIES (mc_jax/memories/__init__.py)"),
        (AGGREGATIONS, AGGREGATION_FACTS, "AGGREGATIONS (mc_jax/caching/aggregations/__init__.py)"),
    ):
        assert list(functions) == list(facts), f"{where} and mc_jax/facts.py name others, or in another order"
    assert get_args(MemoryName) == tuple(MEMORIES)
    assert get_args(AggregationName) == tuple(AGGREGATIONS)


@pytest.mark.parametrize("name", [*MEMORIES, *AGGREGATIONS])
def test_the_mathematics_tell_every_memory_and_aggregation(name):
    text = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    assert f"\n| {name} |" in text, f"docs/math.md has no row for {name}: give its equation and its source"


@pytest.mark.parametrize("name", MEMORIES)
def test_the_facts_of_a_memory_are_those_of_its_functions(name):
    family, facts = MEMORIES[name], MEMORY_FACTS[name]
    assert facts.may_be_mlp == (family.mlp is not None), f"mc_jax/facts.py: may_be_mlp of {name}"
    assert facts.takes_gradients == family.matrix.takes_gradients, (
        f"mc_jax/facts.py: takes_gradients of {name}"
    )
    has_momentum = "momentum" in family.matrix.coefficients
    assert facts.has_momentum == has_momentum, f"mc_jax/facts.py: has_momentum of {name}"


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_writes_errors_where_what_it_recalls_changes_what_it_writes(name):
    k, q = jnp.asarray(np.random.default_rng(0).normal(0, 0.5, (2, 1, 4, 1, 2)), jnp.float32)
    coefficients, options = jnp.full((1, 4, 1), 0.5), {"memory": name, "aggregation": "none"}

    @jax.jit
    def read(initial):
        return memory_caching(q, k, q, step=coefficients, initial_state=initial, chunk_length=4, **options)[0]

    start = jnp.asarray([[[1.0, 0.5], [0.2, -1.0]]])
    change = read(start) - read(jnp.zeros_like(start))
    writes_errors = not np.allclose(change, jnp.einsum("bthk,hkv->bthv", q, start), atol=1e-5)
    assert MEMORY_FACTS[name].writes_errors == writes_errors, f"mc_jax/facts.py: writes_errors of {name}"


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_facts_of_an_aggregation_are_those_of_its_functions(name):
    aggregation, facts = AGGREGATIONS[name], AGGREGATION_FACTS[name]
    assert facts.reads_cache == (aggregation.gates is not None), f"mc_jax/facts.py: reads_cache of {name}"
    if aggregation.select is not None or facts.can_anneal:
        assert facts.top_k != "never", f"mc_jax/facts.py: what {name} selects is top_k of them"
    if not facts.reads_cache:
        assert facts == AggregationFacts(reads_cache=False), f"mc_jax/facts.py: {name} reads nothing"


def test_an_optional_top_k_may_be_given_or_not_and_is_what_annealing_goes_to(monkeypatch):
    optional = dataclasses.replace(AGGREGATION_FACTS["sparse"], top_k="optional")
    monkeypatch.setitem(AGGREGATION_FACTS, "sparse", optional)
    training = TrainingConfig(top_k_anneal_steps=10)
    for top_k in (None, 3):
        validate(Config(model=ModelConfig(aggregation="sparse", top_k=top_k)))
    validate(Config(model=ModelConfig(aggregation="sparse", top_k=3), training=training))
    with pytest.raises(ConfigError, match=r"top_k_anneal_steps has no effect with model\.top_k None"):
        validate(Config(model=ModelConfig(aggregation="sparse"), training=training))

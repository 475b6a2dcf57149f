"""A trained model read otherwise is the model of those settings with its weights: the reference says so."""

import contextlib
import dataclasses
import inspect

import jax
import numpy as np
import pytest
from reference.mc_reference import memory_caching_reference
from untrained import run_of

import mc_jax.nn.mixer
from mc_jax.config import TrainingConfig, differences
from mc_jax.evaluation.core import held_out_text, measure
from mc_jax.evaluation.dial import DIAL, must_have_weights, turn, turned_config
from mc_jax.evaluation.modes import Windows
from mc_jax.evaluation.sweep.cost import costs_of
from mc_jax.evaluation.sweep.grid import Cell
from mc_jax.training.losses import _compiled

CELLS = {
    "gated read sparsely": (
        {"memory": "delta", "router_dim": 3},
        {"model.aggregation": "sparse", "model.top_k": 1},
    ),
    "gated by average, shorter segments": (
        {"segment_init": "independent"},
        {"model.aggregation": "average", "model.top_k": 2, "model.segment_length": 6},
    ),
    "gated by groups, longer segments": (
        {"memory": "swla"},
        {"model.segmentation": "logarithmic", "model.segment_length": 16},
    ),
    "plain read residually": ({"aggregation": "none"}, {"model.aggregation": "residual"}),
    "an MLP with its caches off": ({"memory": "titans", "memory_depth": 2}, {"model.aggregation": "none"}),
}


def by_the_reference(q, k, v, routing, coefficients, settings, *, document_ids, initial_state, top_k, bad):
    """What the mixer calls, by the definition."""
    del document_ids, bad  # a window holds one document, and is finite
    _SEEN.append(settings)
    assert top_k is None
    given = {name: getattr(settings, name) for name in _SETTINGS}
    routing = {} if routing is None else routing._asdict() | {"router_keys": routing.keys}
    u = routing.pop("u", q)
    routing.pop("keys", None)
    assert routing.pop("cache_scale", None) is None, "the reference knows no scale"
    y, _, _ = memory_caching_reference(
        q, k, v, u, **given, **routing, **coefficients._asdict(), initial_state=initial_state
    )
    return y, None


_SEEN = []
_SETTINGS = [
    name
    for name in inspect.signature(memory_caching_reference).parameters
    if name in {"memory", "aggregation", "segment_length", "segmentation", "segment_init", "top_k"}
    | {"chunk_length", "router_blocks", "branch"}
]  # fmt: skip


@contextlib.contextmanager
def mixers_of_the_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc_jax.nn.mixer.memory, "forward", by_the_reference)
        _compiled.cache_clear()
        yield
    _compiled.cache_clear()


def test_a_run_of_which_the_router_alone_was_trained_is_read_with_its_caches_off_and_has_a_cost():
    run = run_of()
    training = TrainingConfig(train=("router_query", "router_key", "online_logit"))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, training=training))
    changes = {"model.aggregation": "none"}
    must_have_weights("runs/untrained", run.config, changes)
    turned = turn(run, changes)
    assert turned.config.model.aggregation == "none"
    cell = Cell(
        run="runs/untrained", changes=changes, config=turned.config, trained=run.config, mode="stream"
    )
    costs = costs_of(cell, run.dataset.held_out, run.dataset.tokenizer.vocab_size)
    assert costs["cell"] == costs["recurrence"]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_what_the_reference_says_of_its_settings(cell):
    trained, changes = CELLS[cell]
    run = run_of(**trained)
    turned = turn(run, changes)
    store, mode = held_out_text(run.dataset, "the test"), Windows(length=40, stride=20)
    found = measure(turned, store, mode)
    with mixers_of_the_reference():
        expected = measure(turned, store, mode)
    np.testing.assert_allclose(found.sums.nats, expected.sums.nats, rtol=2e-5)
    for name, value in changes.items():
        assert found.origin.turned[name][1] == value, "a result says what differs from training"
    assert _SEEN.pop().aggregation == turned.config.model.aggregation, "the reference was not asked"


def test_turning_to_what_was_trained_changes_nothing():
    run = run_of()
    same = turn(run, {"model.aggregation": "gated", "model.segment_length": 8})
    assert not differences(same.config, run.config)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, *(jax.tree.leaves(jax.device_get(one.model)) for one in (same, run)))
    )


def test_what_cannot_stay_changes_too_and_is_said():
    config = run_of(
        aggregation="sparse", top_k=2, router_blocks=2, router_dim=3, cache_scale="learned"
    ).config
    off = turned_config(config, {"model.aggregation": "none"})
    assert {name: new for name, (new, _) in differences(off, config).items()} == {
        "model.aggregation": "none",
        "model.top_k": None,
        "model.router_blocks": 1,
        "model.router_dim": None,
        "model.cache_scale": None,
    }
    short = turned_config(run_of().config, {"model.segment_length": 6})
    assert short.model.chunk_length == 2, "chunks of a linear memory are a way to compute"


@pytest.mark.parametrize(
    ("trained", "changes", "told"),
    [
        (
            {"aggregation": "none"},
            {"model.aggregation": "gated"},
            r"\(online_logit, router_key, router_query\); train them: mc-jax train RECIPE --name NAME "
            "--model.aggregation gated",
        ),
        ({}, {"model.aggregation": "sparse"}, "needs model.top_k; set it"),
        ({}, {"model.top_k": 2}, "model.top_k 2 has no effect with model.aggregation 'gated'"),
        (
            {},
            {"model.aggregation": "none", "model.segment_length": 16},
            "segment_length 16 has no effect with model.aggregation 'none'",
        ),
        (
            {},
            {"model.aggregation": "residual", "model.segmentation": "logarithmic"},
            "not defined with model.aggregation 'residual'",
        ),
        (
            {"memory": "titans", "memory_depth": 1},
            {"model.segment_length": 6},
            "model.chunk_length 4 does not divide model.segment_length 6",
        ),
        (
            {"layer_pattern": ("attention",)},
            {"model.segment_length": 16},
            "no effect on a model without memory layers",
        ),
        ({}, {"model.aggregation": "gate"}, "model.aggregation is 'gate'"),
        ({}, {"model.memory": "delta"}, f"those that can are {', '.join(DIAL)}"),
        ({}, {"data.context_length": 0}, "data.context_length is 0"),
    ],
)
def test_what_cannot_be_turned_is_refused_with_the_cure(trained, changes, told):
    with pytest.raises(ValueError, match=told):
        turn(run_of(**trained), changes)


def test_turning_twice_is_told_from_training():
    run = run_of()
    twice = turn(turn(run, {"model.segment_length": 16}), {"model.aggregation": "none"})
    assert twice.trained == run.config
    assert dataclasses.replace(twice.config.model, aggregation="gated") == dataclasses.replace(
        run.config.model, segment_length=16
    )

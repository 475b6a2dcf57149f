"""The functional core against the token-by-token reference of docs/math.md, with gradients, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import (
    AGGREGATIONS,
    CHUNK,
    HEADS,
    KEY,
    MEMORIES,
    NAMES,
    SEGMENT,
    SLOW_BUT_ONE,
    arguments,
)
from reference.mc_reference import memory_caching_reference

from mc_jax.caching import Routing, Settings, forward, memory_caching
from mc_jax.memories import Coefficients
from pallas_kernels._branch import BRANCHES

_LOGARITHMIC_SUMS = {"aggregation": "gated", "segmentation": "logarithmic", "segment_init": "independent"}


def check_agreement(settings, found, tolerance=1e-9, gradient_tolerance=1e-7):
    """Assert that core and reference agree on these arguments: reads, cached states, all gradients."""
    fixed = {name: value for name, value in found.items() if name == "document_ids"}
    moving = {name: value for name, value in found.items() if name != "document_ids"}
    y_like = found["v"]
    meaning = {name: value for name, value in settings.items() if name != "selected_read"}
    weights = jax.random.normal(jax.random.key(1), y_like.shape, y_like.dtype)

    def ours(moving):
        y, cache = memory_caching(**moving, **fixed, **settings)
        return jnp.sum(jnp.sin(y) * weights), (y, cache)

    def theirs(moving):
        u = moving.get("u", jnp.zeros((*y_like.shape[:3], KEY), y_like.dtype))
        rest = {name: value for name, value in moving.items() if name not in ("q", "k", "v", "u")}
        y, states, pooled = memory_caching_reference(
            moving["q"], moving["k"], moving["v"], u, **rest, **fixed, **meaning
        )
        return jnp.sum(jnp.sin(y) * weights), (y, states, pooled)

    # Each compiled whole: gradients taken of a compiled function, or of none, cost twice the time.
    (_, (y, cache)), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(moving)
    (_, (expected, states, _)), expected_gradients = jax.jit(jax.value_and_grad(theirs, has_aux=True))(moving)
    assert error(y, expected) <= tolerance, "reads differ"
    if settings["aggregation"] != "none" and not fixed:
        count = y.shape[1] // settings["segment_length"]
        for got, right in zip(jax.tree.leaves(cache.cached.states), jax.tree.leaves(states), strict=True):
            assert error(got[:, :count], right[:, :count]) <= tolerance, "cached states differ"
    for name in moving:
        for got, right in zip(
            jax.tree.leaves(gradients[name]), jax.tree.leaves(expected_gradients[name]), strict=True
        ):
            assert error(got, right) <= gradient_tolerance, f"the gradient of {name} differs"


def error(got, expected):
    """Relative to the largest expected number; 0 where both are empty."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(got))
    if not got.size:
        return 0.0
    return np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("memory", "mlp"), SLOW_BUT_ONE, ids=NAMES)
def test_every_memory_and_aggregation_agrees_with_the_reference(memory, mlp, aggregation):
    # In turn, as on a chessboard: every memory and every aggregation has both.
    turn = MEMORIES.index((memory, mlp)) + list(AGGREGATIONS).index(aggregation)
    segment_init = ("checkpoint", "independent")[turn % 2]
    settings = {
        "memory": memory,
        "aggregation": aggregation,
        "segment_length": SEGMENT,
        "chunk_length": CHUNK,
        "segment_init": segment_init,
        **AGGREGATIONS[aggregation],
    }
    if mlp:
        settings["branch"] = BRANCHES[turn // 2 % 2]
    check_agreement(settings, arguments(memory, mlp, aggregation))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("memory", "mlp"), SLOW_BUT_ONE, ids=NAMES)
def test_packed_documents_agree_with_the_reference(memory, mlp):
    # In turn: test_chunk_memory and test_deep_memory have all rules with both, and documents.
    segment_init = ("independent", "checkpoint")[MEMORIES.index((memory, mlp)) % 2]
    settings = {
        "memory": memory,
        "aggregation": "gated",
        "segment_length": SEGMENT,
        "chunk_length": CHUNK,
        "segment_init": segment_init,
    }
    if memory == "titans" and mlp:
        settings["branch"] = "plain"
    check_agreement(settings, arguments(memory, mlp, "gated", length=29, documents=True))


# A router that scores blocks or groups has to know of documents, too; keys alone do not change.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("router", "settings", "documents"),
    [
        ("keys", {"aggregation": "gated"}, True),
        ("keys", {"aggregation": "sparse", "top_k": 1}, False),
        ("inputs", {"aggregation": "gated", "router_blocks": 4}, False),
        ("keys", {"aggregation": "sparse", "top_k": 2, "router_blocks": 2}, True),
        ("keys", {"aggregation": "null", "router_blocks": 2}, True),
        ("inputs", {"aggregation": "null", "top_k": 1, "selected_read": "grouped"}, False),
        ("inputs", {"aggregation": "null", "top_k": 2, "selected_read": "dense"}, True),
        ("inputs", {"aggregation": "gated", "segmentation": "logarithmic"}, False),
        ("inputs", {"aggregation": "gated", "segmentation": "logarithmic"}, True),
        ("inputs", _LOGARITHMIC_SUMS, False),
        ("inputs", _LOGARITHMIC_SUMS, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_router_form_agrees_with_the_reference(router, settings, documents):
    settings = {"memory": "linear", "segment_length": SEGMENT, "chunk_length": CHUNK, **settings}
    found = arguments("linear", False, settings["aggregation"], length=61, documents=documents, router=router)
    if settings.get("segment_init") == "independent":
        del found["initial_state"]  # it would be counted once a segment: refused
    check_agreement(settings, found)


@pytest.mark.usefixtures("x64")
def test_what_a_document_forgets_costs_no_other_one_its_precision():
    settings = {"memory": "linear", "segment_length": SEGMENT, "chunk_length": CHUNK, **_LOGARITHMIC_SUMS}
    found = arguments("linear", False, "gated", length=61)
    del found["initial_state"]
    # The first document forgets nearly all at every token, and so does the second one's first segment.
    position = jnp.arange(61)[None]
    found["document_ids"] = jnp.broadcast_to((position >= 19).astype(jnp.int32), (2, 61))
    found["retention"] = jnp.where(position[..., None] < 28, 1e-30, 0.9 + 0.1 * found["retention"])
    found["retention"] = jnp.broadcast_to(found["retention"], (2, 61, HEADS))
    rest = {name: value for name, value in found.items() if name not in ("q", "k", "v", "u")}
    expected, _, _ = memory_caching_reference(
        found["q"], found["k"], found["v"], found["u"], **rest, **settings
    )
    narrow = {name: x if name == "document_ids" else x.astype(jnp.float32) for name, x in found.items()}
    y = jax.jit(lambda found: memory_caching(**found, **settings)[0])(narrow)
    assert error(y, expected) <= 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "mlp", "length"),
    [(*MEMORIES[0], 1), (*MEMORIES[0], 9), (*MEMORIES[-1], 3), (*MEMORIES[-1], 16)],
)
def test_odd_lengths_agree_with_the_reference(memory, mlp, length):
    settings = {"memory": memory, "aggregation": "gated", "segment_length": SEGMENT, "chunk_length": CHUNK}
    check_agreement(settings, arguments(memory, mlp, "gated", length=length))


@pytest.mark.slow
def test_float32_agrees_to_its_own_rounding():
    for memory, aggregation in (("linear", "gated"), ("titans", "sparse")):
        settings = {"memory": memory, "aggregation": aggregation, "segment_length": SEGMENT}
        settings |= {"chunk_length": CHUNK, **AGGREGATIONS[aggregation]}
        found = arguments(memory, False, aggregation, dtype=jnp.float32)
        check_agreement(settings, found, tolerance=1e-5, gradient_tolerance=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("memory", "mlp"), [MEMORIES[0], MEMORIES[-1]], ids=[NAMES[0], NAMES[-1]])
def test_tokens_grouped_by_state_read_what_the_dense_form_reads(memory, mlp):
    found = arguments(memory, mlp, "sparse", length=45)
    coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})

    def read(form):
        settings = Settings(
            memory=memory,
            aggregation="sparse",
            top_k=2,
            segment_length=SEGMENT,
            chunk_length=CHUNK,
            selected_read=form,
        )

        def loss(q, u, initial_state):
            routing = Routing(u, found["router_keys"], found["online_logit"])
            output = forward(
                q, found["k"], found["v"], routing, coefficients, settings, initial_state=initial_state
            )
            return jnp.sum(jnp.sin(output.y))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    inputs = (found["q"], found["u"], found["initial_state"])
    for got, right in zip(
        jax.tree.leaves(read("grouped")(*inputs)), jax.tree.leaves(read("dense")(*inputs)), strict=True
    ):
        assert error(got, right) <= 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "lstm"}, "unknown memory 'lstm'; choose from linear"),
        ({"aggregation": "sparse"}, "set top_k to 1 or more"),
        ({"top_k": 2}, "top_k has no effect with aggregation 'gated'"),
        ({"chunk_length": 3}, "chunk_length 3 does not divide segment_length 8"),
        ({"segmentation": "logarithmic", "router_blocks": 2}, "set router_blocks to 1"),
        (
            {"memory": "delta", "segmentation": "logarithmic", "segment_init": "independent"},
            "set segment_init to 'checkpoint'",
        ),
        ({"aggregation": "residual"}, "u has no effect with aggregation 'residual'"),
        ({"u": None}, "give its queries u"),
        ({"momentum": True}, "momentum has no effect on memory 'linear'"),
        ({"initial_state": True}, "memory 'linear' is a matrix"),
        ({"branch": "plain"}, "branch 'plain' has no effect on memory 'linear' whose state is a matrix"),
        ({"branch": "sharp"}, "unknown branch 'sharp'; choose from None, bounded, plain"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_not_defined_is_refused_with_the_cure(changes, message):
    found = arguments("linear", False, "gated", length=9, dtype=jnp.float32)
    replaced = {
        "momentum": found["step"],
        "initial_state": (found["initial_state"], found["initial_state"]),
    }
    changes = {name: replaced[name] if value is True else value for name, value in changes.items()}
    settings = {"aggregation": "gated", "segment_length": SEGMENT, "chunk_length": CHUNK}
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_caching(**{**found, **settings, **changes})

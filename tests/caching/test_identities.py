"""The identities of docs/math.md section 4, that need no reference, of the functional core in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, SEGMENT, arguments

from mc_jax import memory_caching

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.xdist_group("identities"),  # one worker: they share what is compiled
]
LENGTH = 29


def read(memory, aggregation, *, mlp=False, found=None, **settings):
    found = arguments(memory, mlp, aggregation, length=LENGTH) if found is None else found
    settings = {"segment_length": SEGMENT, "chunk_length": CHUNK, **AGGREGATIONS[aggregation], **settings}
    return compiled(memory=memory, aggregation=aggregation, **settings)(found)


@functools.cache
def compiled(**settings):
    """Once for all tests that read with these settings."""
    return jax.jit(lambda found: memory_caching(**found, **settings)[0])


def without_router(found):
    return {name: value for name, value in found.items() if name not in ("u", "router_keys", "online_logit")}


def assert_same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name != "none"])
def test_within_one_segment_every_aggregation_is_the_base_memory(aggregation):
    found = arguments("linear", False, aggregation, length=LENGTH)
    expected = read("linear", "none", found=without_router(found), segment_length=32)
    assert_same(read("linear", aggregation, found=found, segment_length=32), expected)


def test_a_soup_of_matrices_is_the_gated_read_and_one_of_mlps_is_not():
    assert_same(read("delta", "soup"), read("delta", "gated"))
    difference = read("dla", "soup", mlp=True) - read("dla", "gated", mlp=True)
    assert np.max(np.abs(difference)) > 1e-3


def test_a_sparse_read_of_as_many_memories_as_there_are_is_the_gated_read():
    expected = read("linear", "gated")
    for form in (3, 9):
        assert_same(read("linear", "sparse", top_k=form), expected)


def test_beside_a_null_the_online_memory_is_read_whole_and_the_cached_ones_as_if_gated():
    found = arguments("delta", False, "null", length=LENGTH)
    online = read("delta", "none", found=without_router(found))
    takes_all = {**found, "online_logit": jnp.full_like(found["online_logit"], 1e4)}
    assert_same(read("delta", "null", found=takes_all), online)
    # With no weight on the online memory, what is gated is the cached ones alone; the first segment has none.
    takes_nothing = {**found, "online_logit": jnp.full_like(found["online_logit"], -1e4)}
    gated, null = (read("delta", name, found=takes_nothing) for name in ("gated", "null"))
    assert_same(null[:, SEGMENT:], (online + gated)[:, SEGMENT:])


def test_a_read_beside_a_null_of_as_many_memories_as_there_are_is_that_of_all():
    expected = read("linear", "null")
    for top_k in (3, 9):
        assert_same(read("linear", "null", top_k=top_k), expected)
    fewer = read("linear", "null", top_k=1)
    assert np.max(np.abs(fewer - expected)) > 1e-3


def test_a_residual_read_of_linear_memories_is_one_read_of_their_sum():
    found = arguments("linear", False, "residual", length=LENGTH)
    ones = {**found, "retention": jnp.ones_like(found["retention"]), "initial_state": None}
    got = read("linear", "residual", found=ones)
    writes = jnp.einsum("bth,bthk,bthv->bthkv", found["step"], found["k"], found["v"])
    states = jnp.cumsum(writes, axis=1)
    total = states
    for end in range(SEGMENT, LENGTH, SEGMENT):
        total = total.at[:, end:].add(states[:, end - 1][:, None])
    assert_same(got, jnp.einsum("bthk,bthkv->bthv", found["q"], total))


def test_memories_with_neutral_coefficients_are_one_another():
    found = arguments("linear", False, "gated", length=LENGTH)
    linear = read("linear", "gated", found=found)
    assert_same(read("dla", "gated", found=found), linear)
    assert_same(read("swla", "gated", found=found), linear)
    online = {**found, "retention": None}
    delta = read("delta", "gated", found=online, chunk_length=1)
    assert_same(read("titans", "gated", found=online, chunk_length=1), delta)


@pytest.mark.parametrize("memory", ["linear", "swla", "delta"])
@pytest.mark.parametrize("chunk_length", [1, 2, 8])
def test_any_chunk_length_gives_the_same(memory, chunk_length):
    assert_same(read(memory, "gated", chunk_length=chunk_length), read(memory, "gated"))


def test_a_checkpoint_is_the_segments_own_memory_and_the_decayed_one_before():
    found = {**without_router(arguments("linear", False, "gated", length=LENGTH)), "initial_state": None}
    run = functools.partial(
        memory_caching, memory="linear", aggregation="residual", segment_length=SEGMENT, chunk_length=CHUNK
    )
    _, checkpoint = run(**found)
    _, independent = run(**found, segment_init="independent")
    decay = jnp.stack([jnp.prod(found["retention"][:, n : n + SEGMENT], axis=1) for n in (8, 16)], axis=1)
    expected = independent.cached.states[:, 1:3] + decay[..., None, None] * checkpoint.cached.states[:, :2]
    assert_same(checkpoint.cached.states[:, 1:3], expected)


@pytest.mark.parametrize("router", ["inputs", "keys"])
@pytest.mark.parametrize(
    ("memory", "mlp", "aggregation"),
    [
        ("linear", False, "gated"),
        ("swla", False, "sparse"),
        pytest.param("titans", True, "soup", marks=pytest.mark.slow),
        pytest.param("delta", False, "gated", marks=pytest.mark.slow),
    ],
)
def test_later_tokens_change_nothing_before_them(memory, mlp, aggregation, router):
    found = arguments(memory, mlp, aggregation, length=LENGTH, router=router)
    first = read(memory, aggregation, found=found)
    for place in (0, 7, 8, 20):
        changed = {
            name: value if name == "initial_state" else value.at[:, place + 1 :].multiply(0.5)
            for name, value in found.items()
        }
        second = read(memory, aggregation, found=changed)
        np.testing.assert_array_equal(second[:, : place + 1], first[:, : place + 1])
        assert np.any(second[:, place + 1 :] != first[:, place + 1 :])


@pytest.mark.parametrize(
    ("memory", "mlp"), [("linear", False), ("delta", False), ("titans", False), ("dla", True)]
)
def test_gradients_are_finite_at_the_extremes(memory, mlp):
    found = arguments(memory, mlp, "gated", length=LENGTH)
    extremes = {
        "keys of zero": {"k": 0 * found["k"], "q": 0 * found["q"]},
        "gates of one memory": {"u": 1e4 * found["u"], "online_logit": 1e4 * found["online_logit"]},
        "a retention of 1": {"retention": jnp.full_like(found["retention"], 1.0)},
        "a retention of nearly 0": {"retention": jnp.full_like(found["retention"], 1e-30)},
    }
    gradients = jax.jit(jax.grad(lambda found: jnp.sum(jnp.sin(read(memory, "gated", mlp=mlp, found=found)))))
    for extreme, changes in extremes.items():
        for name, leaf in jax.tree_util.tree_leaves_with_path(gradients({**found, **changes})):
            assert np.all(np.isfinite(leaf)), f"with {extreme} the gradient of {name} is not finite"

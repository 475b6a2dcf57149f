"""What is kept of the cache, and where: fewer places, narrower numbers, the host's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, SEGMENT, arguments

from mc_jax.caching import Routing, Settings, Storage, decode, forward, segments
from mc_jax.memories import Coefficients

LENGTH = 37
DROPPING = Storage(max_cached=2, when_full="drop-oldest")


def parts(found):
    routing = None
    if "u" in found:
        routing = Routing(found["u"], found.get("router_keys", found["k"]), found.get("online_logit"))
    coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})
    return found["q"], found["k"], found["v"], routing, coefficients


def settings_of(aggregation, memory="linear", **more):
    return Settings(
        memory=memory,
        aggregation=aggregation,
        segment_length=SEGMENT,
        chunk_length=CHUNK,
        **{**AGGREGATIONS[aggregation], **more},
    )


def decoded(found, settings, storage, lengths=(5, 8)):
    """Reads of the tokens after the first `lengths` of each row, and the last cache."""
    lengths = jnp.array(lengths, jnp.int32)
    prefix = int(lengths.max())
    cut = jax.tree.map(lambda x: x[:, :prefix], parts(found))
    initial = found["initial_state"]
    run = jax.jit(lambda *cut: forward(*cut, settings, initial_state=initial, lengths=lengths).cache)
    cache = run(*cut).with_storage(storage)
    step = jax.jit(decode, donate_argnums=5)
    reads = []
    for offset in range(LENGTH - prefix):
        token = jax.tree.map(lambda x, at=lengths + offset: x[np.arange(2), at], parts(found))
        y, cache = step(*token, cache)
        reads.append(y)
    return jnp.stack(reads, axis=1), cache


def root_mean_square_ratio(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("aggregation", "memory", "mlp", "more"),
    [
        ("gated", "linear", False, {"segment_init": "independent"}),
        ("residual", "linear", False, {}),
        ("average", "linear", False, {}),
        ("sparse", "linear", False, {"top_k": 1}),
        ("sparse", "linear", False, {"top_k": 1, "selected_read": "dense"}),
        pytest.param("soup", "titans", True, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_without_the_oldest_memories_tokens_read_the_newest(aggregation, memory, mlp, more, monkeypatch):
    found = arguments(memory, mlp, aggregation, length=LENGTH)
    settings = settings_of(aggregation, memory, **more)
    got, cache = decoded(found, settings, DROPPING)
    everything = segments.eligible

    def newest_two(*arguments):
        eligible = everything(*arguments)
        newer = jnp.cumsum(eligible[..., ::-1], axis=-1)[..., ::-1]
        return eligible & (newer <= 2)

    monkeypatch.setattr(segments, "eligible", newest_two)
    run = jax.jit(lambda *whole: forward(*whole, settings, initial_state=found["initial_state"]).y)
    expected = run(*parts(found))
    for row, length in enumerate((5, 8)):
        window = expected[row, length : length + got.shape[1]]
        np.testing.assert_allclose(got[row], window, rtol=1e-9, atol=1e-11)
    assert cache.capacity == 2
    assert not cache.overflowed().any()


@pytest.mark.usefixtures("x64")
def test_moving_to_fewer_and_to_more_places_keeps_the_newest_memories_in_order():
    found = arguments("linear", False, "gated", length=LENGTH)
    settings = settings_of("gated")
    cache = forward(*parts(found), settings).cache  # 4 memories
    moved = cache.with_storage(Storage(max_cached=3, when_full="drop-oldest"))
    moved = moved.with_storage(DROPPING).with_storage(Storage(max_cached=5))
    assert list(moved.count) == [2, 2]
    np.testing.assert_array_equal(moved.cached.states[:, :2], cache.cached.states[:, 2:4])
    assert moved.pooled is not None
    assert cache.pooled is not None
    np.testing.assert_array_equal(moved.pooled.mean[:, :2], cache.pooled.mean[:, 2:4])


@pytest.mark.parametrize(("state_dtype", "bound", "share"), [("bfloat16", 5e-3, 0.5), ("int8", 1e-2, 0.25)])
@pytest.mark.parametrize("aggregation", ["gated", "sparse"])
def test_narrow_states_read_nearly_the_same_from_fewer_bytes(aggregation, state_dtype, bound, share):
    found = arguments("linear", False, aggregation, length=LENGTH, dtype=jnp.float32)
    settings = settings_of(aggregation)
    expected, wide = decoded(found, settings, Storage(max_cached=4))
    got, narrow = decoded(found, settings, Storage(max_cached=4, state_dtype=state_dtype))
    assert root_mean_square_ratio(got, expected) <= bound
    scales = 4 * 2 * 4 * 2 if state_dtype == "int8" else 0  # a float for each of 2 x 4 x 2 matrices
    assert narrow.state_nbytes == share * wide.state_nbytes + scales


@pytest.mark.parametrize("storage", [Storage(max_cached=4), DROPPING], ids=["error", "drop-oldest"])
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_states_in_the_hosts_memory_are_read_as_if_they_were_on_the_device(storage, state_dtype):
    found = arguments("linear", False, "sparse", length=LENGTH, dtype=jnp.float32)
    settings = settings_of("sparse")
    change = functools.partial(
        Storage, max_cached=storage.max_cached, when_full=storage.when_full, state_dtype=state_dtype
    )
    expected, _ = decoded(found, settings, change())
    got, cache = decoded(found, settings, change(place="host"))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(cache.cached.states)}
    assert kinds == {"pinned_host"}, "the states left the host's memory"
    assert cache.online.weights.sharding.memory_kind == "device"


def test_a_platform_without_host_memory_is_named(monkeypatch):
    found = arguments("linear", False, "sparse", length=LENGTH, dtype=jnp.float32)
    cache = forward(*parts(found), settings_of("sparse")).cache

    class Device:
        platform = "lunar"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with pytest.raises(ValueError, match="lunar devices do not have here; set place to 'device'"):
        cache.with_storage(Storage(place="host"))


def test_a_full_cache_is_an_error_and_never_a_wrong_read():
    found = arguments("linear", False, "gated", length=LENGTH, dtype=jnp.float32)
    settings = settings_of("gated")
    reads, cache = decoded(found, settings, Storage(max_cached=3))
    # Row 1 has 8 tokens before the first of these; after 32 it completes its fourth segment.
    assert np.all(np.isfinite(reads[1, :24]))
    assert np.all(np.isnan(reads[1, 24:]))
    with pytest.raises(ValueError, match=r"rows \[0, 1\] completed more segments than its 3 places"):
        cache.check()
    token = jax.tree.map(lambda x: x[:, 0], parts(found))
    with pytest.raises(ValueError, match="the cache is full"):
        decode(*token, cache)
    with pytest.raises(ValueError, match="the cache is full"):
        cache.with_storage(Storage(max_cached=9)).check()


@pytest.mark.parametrize(
    ("aggregation", "more", "storage", "message"),
    [
        ("none", {}, {"state_dtype": "int8"}, "a storage has no effect with aggregation 'none'"),
        ("gated", {}, {"place": "host"}, "set aggregation to 'sparse'"),
        ("sparse", {"selected_read": "dense"}, {"place": "host"}, "without a dense selected_read"),
        (
            "gated",
            {"segmentation": "logarithmic"},
            {"when_full": "drop-oldest", "max_cached": 1},
            "set when_full to 'error'",
        ),
        ("gated", {}, {"when_full": "panic"}, "unknown when_full 'panic'; choose from error, drop-oldest"),
        ("gated", {}, {"max_cached": 0}, "max_cached is 0; set it to 1 or more"),
    ],
)
def test_what_cannot_be_kept_so_is_refused_with_the_cure(aggregation, more, storage, message):
    found = arguments("linear", False, aggregation, length=9, dtype=jnp.float32)
    cache = forward(*parts(found), settings_of(aggregation, **more)).cache
    with pytest.raises(ValueError, match=message):
        cache.with_storage(Storage(**storage))

"""One token at a time gives what the parallel form gives, in rows of different lengths, past segment ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, MEMORIES, NAMES, SEGMENT, SLOW_BUT_ONE, arguments

from mc_jax.caching import Routing, Settings, Storage, decode, forward
from mc_jax.memories import Coefficients

LENGTH = 21


def _parts(found):
    routing = None
    if "u" in found:
        keys = found.get("router_keys", found["k"])
        routing = Routing(found["u"], keys, found.get("online_logit"), found.get("cache_scale"))
    elif "cache_scale" in found:
        routing = Routing(None, None, None, found["cache_scale"])
    coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})
    return found["q"], found["k"], found["v"], routing, coefficients


def _decoded(found, settings, lengths, places):
    """Prefill rows of `lengths` tokens, then decode to the end; reads at each row's every later token."""
    parts = _parts(found)
    prefix = int(lengths.max())
    cut = jax.tree.map(lambda x: x[:, :prefix], parts)
    cache = jax.jit(
        lambda cut: forward(*cut, settings, initial_state=found["initial_state"], lengths=lengths).cache
    )(cut)
    if cache.capacity:
        cache = cache.with_storage(Storage(max_cached=max(places, cache.capacity)))
    step = jax.jit(decode)
    rows = jnp.arange(2)
    reads = []
    for offset in range(LENGTH - prefix):
        token = jax.tree.map(lambda x, at=lengths + offset: x[rows, at], parts)
        y, cache = step(*token, cache)
        reads.append(y)
    return jnp.stack(reads, axis=1), cache


def check_decoding(memory, mlp, aggregation, router="inputs", scaled=False, **changes):
    found = arguments(memory, mlp, aggregation, length=LENGTH, router=router)
    if scaled:
        found["cache_scale"] = jax.random.normal(jax.random.key(1), found["q"].shape[:3], jnp.float64)
    if changes.get("segmentation") == "logarithmic" and changes.get("segment_init") == "independent":
        found["initial_state"] = None
    settings = Settings(
        memory=memory,
        aggregation=aggregation,
        segment_length=SEGMENT,
        chunk_length=CHUNK,
        **{**AGGREGATIONS[aggregation], **changes},
    )
    whole = jax.jit(lambda parts: forward(*parts, settings, initial_state=found["initial_state"]))
    expected = whole(_parts(found)).y
    lengths = jnp.array([5, 8], jnp.int32)  # inside a chunk and a segment, and at a segment's end
    got, cache = _decoded(found, settings, lengths, places=3)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            got[row], expected[row, length : length + got.shape[1]], rtol=1e-9, atol=1e-11
        )
    assert list(cache.length) == [LENGTH - 3, LENGTH]
    assert cache.nbytes > 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("memory", "mlp"), SLOW_BUT_ONE, ids=NAMES)
def test_decoding_equals_the_parallel_form_for_every_memory(memory, mlp):
    # In turn, as the aggregations below: a cache is the same however a segment's memory began.
    segment_init = ("checkpoint", "independent")[MEMORIES.index((memory, mlp)) % 2]
    branch = "plain" if (memory, mlp) == ("dla", True) else None
    check_decoding(memory, mlp, "gated", segment_init=segment_init, branch=branch)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "mlp", "aggregation"),
    [
        ("linear", False, "none"),
        ("titans", True, "residual"),
        ("linear", False, "soup"),
        ("titans", True, "soup"),
        ("linear", False, "sparse"),
        ("titans", True, "sparse"),
        ("linear", False, "average"),
    ],
)
def test_decoding_equals_the_parallel_form_for_every_aggregation(memory, mlp, aggregation):
    segment_init = "independent" if aggregation == "average" else "checkpoint"
    scaled = (memory, aggregation) in (("titans", "residual"), ("linear", "sparse"))
    check_decoding(memory, mlp, aggregation, segment_init=segment_init, scaled=scaled)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changes",
    [
        {"router": "keys"},
        {"router_blocks": 4},
        {"segmentation": "logarithmic"},
        {"segmentation": "logarithmic", "segment_init": "independent"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_decoding_equals_the_parallel_form_for_every_router_form(changes):
    check_decoding("linear", False, "gated", **changes)


@pytest.mark.usefixtures("x64")
def test_a_packed_rows_cache_is_that_of_its_last_document_alone():
    found = arguments("linear", False, "gated", length=LENGTH)
    settings = Settings(aggregation="gated", segment_length=SEGMENT, chunk_length=CHUNK)
    ids = jnp.broadcast_to((jnp.arange(LENGTH) >= 8).astype(jnp.int32)[None], (2, LENGTH))
    run = functools.partial(forward, settings=settings, initial_state=found["initial_state"])
    packed = run(*_parts(found), document_ids=ids).cache
    alone = run(*jax.tree.map(lambda x: x[:, 8:], _parts(found))).cache
    token = jax.tree.map(lambda x: x[:, 3], _parts(found))
    got, _ = decode(*token, packed.with_storage(Storage(max_cached=4)))
    expected, _ = decode(*token, alone.with_storage(Storage(max_cached=4)))
    np.testing.assert_array_equal(packed.count, alone.count)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_fewer_places_than_memories_are_refused():
    found = arguments("linear", False, "gated", length=LENGTH, dtype=jnp.float32)
    settings = Settings(aggregation="gated", segment_length=SEGMENT, chunk_length=CHUNK)
    cache = forward(*_parts(found), settings).cache
    with pytest.raises(ValueError, match="max_cached 1 is less than the cache has; set it to 3 or more"):
        cache.with_storage(Storage(max_cached=1))

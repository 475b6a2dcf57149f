"""The cache of a parallel run; that decoding goes on from it is in tests/inference/test_invariance.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import CHUNK, SEGMENT, arguments

from mc_jax.caching import Routing, Settings, Storage, decode, forward
from mc_jax.memories import Coefficients

LENGTH = 21


def _parts(found):
    routing = None
    if "u" in found:
        routing = Routing(found["u"], found.get("router_keys", found["k"]), found.get("online_logit"))
    coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})
    return found["q"], found["k"], found["v"], routing, coefficients


@pytest.mark.usefixtures("x64")
def test_a_packed_rows_cache_is_that_of_its_last_document_alone():
    found = arguments("linear", False, "gated", length=LENGTH)
    settings = Settings(aggregation="gated", segment_length=SEGMENT, chunk_length=CHUNK)
    ids = jnp.broadcast_to((jnp.arange(LENGTH) >= 8).astype(jnp.int32)[None], (2, LENGTH))
    run = jax.jit(functools.partial(forward, settings=settings, initial_state=found["initial_state"]))
    packed = run(*_parts(found), document_ids=ids).cache
    alone = run(*jax.tree.map(lambda x: x[:, 8:], _parts(found))).cache
    token = jax.tree.map(lambda x: x[:, 3], _parts(found))
    step = jax.jit(decode)
    got, _ = step(*token, packed.with_storage(Storage(max_cached=4)))
    expected, _ = step(*token, alone.with_storage(Storage(max_cached=4)))
    np.testing.assert_array_equal(packed.count, alone.count)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_fewer_places_than_memories_are_refused():
    found = arguments("linear", False, "gated", length=LENGTH, dtype=jnp.float32)
    settings = Settings(aggregation="gated", segment_length=SEGMENT, chunk_length=CHUNK)
    cache = jax.jit(functools.partial(forward, settings=settings))(*_parts(found)).cache
    with pytest.raises(ValueError, match="max_cached 1 is less than the cache has; set it to 3 or more"):
        cache.with_storage(Storage(max_cached=1))

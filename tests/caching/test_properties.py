"""Whatever the shapes and settings: the core agrees with the token-by-token reference, in every precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, MEMORIES, WITH_ROUTER, arguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.mc_reference import memory_caching_reference

from mc_jax import memory_caching


@st.composite
def cases(draw):
    """Settings that are defined, a length, and whether rows are packed."""
    memory, mlp = draw(st.sampled_from(MEMORIES))
    aggregation = draw(st.sampled_from(list(AGGREGATIONS)))
    chunk = draw(st.sampled_from([1, 2, 4]))
    found = {
        "memory": memory,
        "aggregation": aggregation,
        "chunk_length": chunk,
        "segment_length": chunk * draw(st.integers(1, 3)),
        "segment_init": draw(st.sampled_from(["checkpoint", "independent"])),
    }
    if aggregation in ("sparse", "average"):
        found["top_k"] = draw(st.integers(1, 4))
    if aggregation in WITH_ROUTER and draw(st.booleans()):
        found["router_blocks"] = draw(
            st.sampled_from([n for n in (1, 2, 3) if found["segment_length"] % n == 0])
        )
    # Documents of this test start at multiples of 4 only.
    documents = draw(st.booleans()) if chunk == 4 else False
    length = draw(st.integers(21 if documents else 1, 25))
    router = draw(st.sampled_from(["inputs", "keys"]))
    return found, mlp, length, documents, router


def both(case, dtype):
    options, mlp, length, documents, router = case
    found = arguments(
        options["memory"],
        mlp,
        options["aggregation"],
        length=length,
        documents=documents,
        router=router,
        dtype=dtype,
    )
    y = jax.jit(lambda found: memory_caching(**found, **options)[0])(found)
    rest = {name: value for name, value in found.items() if name not in ("q", "k", "v", "u")}
    u = found.get("u", jnp.zeros((*found["q"].shape[:3], 3), dtype))

    @jax.jit
    def reference(u, rest):
        return memory_caching_reference(found["q"], found["k"], found["v"], u, **rest, **options)[0]

    expected = reference(u, rest)
    return np.asarray(y, np.float64), np.asarray(expected, np.float64)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_any_defined_settings_agree_with_the_reference(case):
    y, expected = both(case, jnp.float64)
    assert np.max(np.abs(y - expected)) <= 1e-9 * max(np.max(np.abs(expected)), 1e-3)


# Every memory once, and every way to read: of matrices (each with another memory) and of MLPs.
WAYS = {
    False: itertools.cycle(("none", "gated", "soup", "sparse")),
    True: itertools.cycle(("soup", "sparse")),
}


@pytest.mark.parametrize(
    ("memory", "mlp", "aggregation"),
    [(memory, mlp, next(WAYS[mlp])) for memory, mlp in MEMORIES],
)
def test_bfloat16_is_as_near_as_its_inputs_are_round(memory, mlp, aggregation):
    options = {"memory": memory, "aggregation": aggregation, "segment_length": 8, "chunk_length": 4}
    options |= AGGREGATIONS[aggregation]
    found = arguments(memory, mlp, aggregation, length=61, dtype=jnp.float32)
    wide = {name: value for name, value in found.items() if name in ("q", "k", "v")}
    rounded = {name: value.astype(jnp.bfloat16) for name, value in wide.items()}
    y = jax.jit(lambda found: memory_caching(**found, **options)[0])({**found, **rounded})
    again = {name: value.astype(jnp.float32) for name, value in rounded.items()}
    expected = jax.jit(lambda found: memory_caching(**found, **options)[0])({**found, **again})
    assert y.dtype == jnp.bfloat16
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    ratio = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert ratio <= 5e-3

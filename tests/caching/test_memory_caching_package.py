"""Agreement with PyPI memory-caching 0.1.0 on what it found once: scripts/bench_layers --record."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax import memory_caching

# B batch, T tokens, L segment, H heads, K key dim.
RECORD = pathlib.Path(__file__).parent / "data" / "memory_caching_0_1_0.npz"
NAMES = ("q", "k", "v", "u")


def sums_of_keys(u, k, segment_length):
    """Router queries and online logits with which scores are <u, sum of keys>, as that package has them."""
    segments = [k[:, start : start + segment_length] for start in range(0, k.shape[1], segment_length)]
    running = jnp.concatenate([jnp.cumsum(segment, axis=1) for segment in segments], axis=1)
    return segment_length * u, jnp.sum(u * running, axis=-1)


def loss(arrays, target, *, aggregation, segment_length, top_k):
    """The recorded loss, and y."""
    router = {}
    if aggregation != "residual":
        router["u"], router["online_logit"] = sums_of_keys(arrays["u"], arrays["k"], segment_length)
    y, _ = memory_caching(
        *(arrays[name] for name in ("q", "k", "v")),
        **router,
        aggregation=aggregation,
        segment_length=segment_length,
        chunk_length=segment_length,
        segment_init="checkpoint",
        top_k=top_k if aggregation == "sparse" else None,
    )
    return jnp.sum(y * target), y


def difference(actual, expected):
    """Largest difference, relative to the largest element."""
    return np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("aggregation", ["residual", "gated", "soup", "sparse"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-9)])
def test_values_and_gradients_are_those_of_the_package(x64, aggregation, dtype, tolerance):
    recorded = np.load(RECORD)
    arrays = {name: jnp.asarray(recorded[name], dtype) for name in NAMES}
    options = {name: int(recorded[name]) for name in ("segment_length", "top_k")}
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss, aggregation=aggregation, **options), has_aux=True)
    )
    (_, y), gradients = step(arrays, jnp.asarray(recorded["target"], dtype))
    assert y.dtype == dtype
    assert difference(y, recorded[f"{aggregation}_y"]) < tolerance, "reads differ"
    for name in NAMES:
        if f"{aggregation}_{name}_bar" in recorded:  # residual has no u
            found = difference(gradients[name], recorded[f"{aggregation}_{name}_bar"])
            assert found < tolerance, f"the gradient of {name} differs"

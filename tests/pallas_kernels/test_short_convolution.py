"""What makes queries, keys and values: the fast forms against the plain one, on and for all platforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS

from pallas_kernels import short_convolution
from pallas_kernels.short_convolution import tpu

# Root mean squares of differences over those of the reference: values, and gradients of x and taps.
FLOAT32, BFLOAT16 = (1e-5, 1e-5, 1e-5), (5e-3, 8e-3, 8e-3)
# Rows, tokens, channels, heads, taps, documents, scaled to length 1.
CASES = [
    (2, 300, 256, 2, 4, True, True),
    (1, 128, 384, 4, 3, False, True),  # heads of 96, which lanes do not divide
    (1, 17, 128, 16, 4, True, False),
    (1, 600, 768, 8, 1, False, True),
]


def arguments(rows, tokens, channels, heads, width, documents, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens), 4)
    x = jax.random.normal(keys[0], (rows, tokens, channels), dtype)
    taps = jax.random.normal(keys[1], (width, channels), dtype if dtype == jnp.float64 else jnp.float32)
    bar = jax.random.normal(keys[2], (rows, tokens, heads, channels // heads), dtype)
    starts = jax.random.bernoulli(keys[3], 0.1, (rows, tokens))
    return x, taps, bar, jnp.cumsum(starts, axis=1, dtype=jnp.int32) if documents else None


def values_and_gradients(implementation, x, taps, bar, document_ids, heads, normalize):
    @jax.jit
    def run(x, taps, bar):
        op = functools.partial(
            short_convolution,
            heads=heads,
            normalize=normalize,
            document_ids=document_ids,
            implementation=implementation,
        )
        y, vjp = jax.vjp(op, x, taps)
        return y, *vjp(bar)

    return run(x, taps, bar)


def error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_shifted_rows_are_the_reference(documents, normalize):
    found = arguments(2, 11, 12, 3, 4, documents, jnp.float64)
    results = [values_and_gradients(name, *found, 3, normalize) for name in ("xla", "reference")]
    for got, expected in zip(*results, strict=True):
        # Lengths are taken in float32, as models have them.
        np.testing.assert_allclose(
            got, expected, rtol=1e-6 if normalize else 1e-12, atol=1e-6 if normalize else 1e-12
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "tokens", "channels", "heads", "width", "documents", "normalize"), CASES)
def test_the_kernel_is_the_reference(
    rows, tokens, channels, heads, width, documents, normalize, dtype, monkeypatch
):
    monkeypatch.setattr(tpu, "_CHANNELS", 256)  # so that there are several blocks of them
    x, taps, bar, ids = arguments(rows, tokens, channels, heads, width, documents, dtype)
    with pltpu.force_tpu_interpret_mode():
        found = values_and_gradients("tpu", x, taps, bar, ids, heads, normalize)
    assert found[0].dtype == found[1].dtype == dtype
    wide = (one.astype(jnp.float32) for one in (x, taps, bar))
    expected = values_and_gradients("reference", *wide, ids, heads, normalize)
    bounds = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    for name, got, right, bound in zip(("y", "x", "taps"), found, expected, bounds, strict=True):
        assert error(got, right) <= bound, f"{name} is off by {error(got, right):.1e}"


def test_what_nobody_wrote_reaches_no_result():
    x, taps, bar, ids = arguments(1, 300, 256, 2, 4, True)
    poisoned = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    with pltpu.force_tpu_interpret_mode(poisoned):
        found = values_and_gradients("tpu", x, taps, bar, ids, 2, True)
    for got in found:
        assert np.all(np.isfinite(got)), "scratch is read before it is written"


@pytest.mark.parametrize(("heads", "channels"), [(16, 1536), (8, 2048)])
@pytest.mark.parametrize("chip", CHIPS)
def test_it_compiles_at_the_recipes_sizes(programs, chip, heads, channels):
    def both(x, taps, bar, ids):
        return values_and_gradients("tpu", x, taps, bar, ids, heads, True)

    x = jax.ShapeDtypeStruct((1, 4096, channels), jnp.bfloat16)
    taps = jax.ShapeDtypeStruct((4, channels), jnp.float32)
    bar = jax.ShapeDtypeStruct((1, 4096, heads, channels // heads), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    found = programs.compiled_for(chip, both, x, taps, bar, ids)
    assert sum(found["kernels"].values()) >= 2, "forward and backward must be kernels"


def test_arguments_that_do_not_fit_are_refused():
    x, taps, _, ids = arguments(2, 9, 12, 3, 4, True)
    for changed, message in (
        ({"taps": taps[:, :8]}, "do not fit x"),
        ({"heads": 5}, "5 heads do not divide the 12 channels"),
        ({"document_ids": ids[:1]}, "document_ids"),
        ({"implementation": "cuda"}, "choose one of reference, tpu, xla"),
        ({"implementation": "tpu"}, "there is no kernel for 4 taps on 12 channels in 3 heads"),
    ):
        given = {"x": x, "taps": taps, "heads": 3, "normalize": True, "document_ids": ids} | changed
        with pytest.raises(ValueError, match=message):
            short_convolution(**given)

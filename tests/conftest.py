"""Strictness for every test: no silent dtype or rank promotion, and several devices on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile hundreds of small programs and run each a few times: half the time of compiling is saved.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Run a test with float64 arrays on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_tpu_compiler():
    """Compile what is around kernels without optimisations, a training step in a quarter of the time."""
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", level)

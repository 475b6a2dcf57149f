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


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A folder of compiled programs that all workers share: many tests run the same training step."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


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

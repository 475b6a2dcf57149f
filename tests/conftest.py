"""Strictness for every test: no silent dtype or rank promotion, and several devices on the CPU."""

import gc
import itertools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from programs import MOST_UNRECORDED, Programs, write_record

import pallas_kernels  # noqa: F401  (sets XLA's flags before JAX starts)

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


_MOST_MAPPINGS = 30_000
"""Mappings of memory with which a process forgets its programs. Linux gives it 65,530, XLA takes four a
program, and where there are none left it dies of a segmentation fault."""
_TESTS_BETWEEN_LOOKS = 4
_tests_begun = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Forget compiled programs before there are more than a process may have."""
    if next(_tests_begun) % _TESTS_BETWEEN_LOOKS == 0 and _mappings() > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()  # some are held by cycles alone


def _mappings() -> int:
    """How many this process has; 0 where there is no telling."""
    try:
        with open("/proc/self/maps", "rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return 0


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


SEEN = pytest.StashKey[dict[str, bool]]()
"""Of each program for TPUs that a test has lowered, by name, whether it is on record (`programs`)."""


def pytest_addoption(parser):
    group = parser.getgroup("programs for TPUs that are not here")
    group.addoption(
        "--all", action="store_const", const="all", dest="programs", help="compile those on record, too"
    )
    group.addoption(
        "--record", action="store_const", const="record", dest="programs", help="and run no other tests"
    )
    group.addoption(
        "--check",
        action="store_const",
        const="check",
        dest="programs",
        help="fail where one must be compiled",
    )


def pytest_configure(config):
    config.stash[SEEN] = {}


def pytest_collection_modifyitems(config, items):
    if config.option.programs in ("record", "check"):
        items[:] = [item for item in items if "programs" in item.fixturenames]
    if hasattr(config, "workerinput"):
        # The longest come first, so that no worker is left with one when the others are done.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


_OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""Python looks for cycles after 700 new objects unless told otherwise, and tracing makes millions."""


def pytest_collection_finish():
    """Look for cycles seldom, and never among what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


@pytest.fixture
def programs(request):
    """Programs for TPUs that are not here, which are not compiled again if they are on record."""
    return Programs(request.node.nodeid, request.config.option.programs, request.config.stash[SEEN])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[SEEN].update(getattr(node, "workeroutput", {}).get("seen", {}))


def _is_everything(config) -> bool:
    option = config.option
    some = option.keyword or option.markexpr or option.collectonly or option.deselect
    return config.args_source.name == "TESTPATHS" and not some


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    seen = config.stash[SEEN]
    if hasattr(config, "workeroutput"):
        config.workeroutput["seen"] = seen
    elif exitstatus == 0 and _is_everything(config):
        if config.option.programs == "record":
            write_record({}, only=seen)
        elif list(seen.values()).count(False) > MOST_UNRECORDED:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    unrecorded = sorted(name for name, known in config.stash[SEEN].items() if not known)
    if unrecorded and not config.option.programs:
        terminalreporter.section(f"{len(unrecorded)} programs for TPUs were compiled")
        terminalreporter.line(f"A run of all tests fails if there are more than {MOST_UNRECORDED}.")
        terminalreporter.line("Record them, it takes as long as this once more: scripts/record_programs")
        for name in unrecorded:
            terminalreporter.line(f"  {name}")

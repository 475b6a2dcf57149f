"""A program's fingerprint is that of what is compiled, and a record saves compiling, not looking."""

import json
import types

import conftest
import jax
import jax.numpy as jnp
import programs as module
import pytest
from jax.experimental import pallas as pl
from programs import Programs, fingerprint
from tpu_topology import lower_for

SOURCE = """
def kernel(x_ref, y_ref):
    y_ref[...] = 2.0 * x_ref[...]

def run(x):
    return jnp.sin(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="twice")(x))
"""


def lowered(source: str = SOURCE, *, chip: str = "v5e", file: str = "here.py", size: int = 128):
    found = {"jax": jax, "jnp": jnp, "pl": pl}
    exec(compile(source, file, "exec"), found)
    return lower_for(chip, found["run"], jax.ShapeDtypeStruct((size, 128), jnp.float32))


def test_where_a_kernel_stands_does_not_count():
    moved = lowered("\n# Another line.\n" + SOURCE.replace("\ndef run", "\n\n\ndef run"), file="/there/x.py")
    assert fingerprint(moved) == fingerprint(lowered())


@pytest.mark.parametrize(
    "change",
    [
        {"source": SOURCE.replace("2.0", "3.0")},
        {"source": SOURCE.replace("jnp.sin", "jnp.cos")},
        {"size": 256},
        {"chip": "v5p"},
    ],
    ids=["the kernel", "what is around it", "shapes", "the chip"],
)
def test_what_is_compiled_counts(change):
    assert fingerprint(lowered(**change)) != fingerprint(lowered())


def test_the_compiler_and_its_options_count(monkeypatch):
    program = lowered()
    found = {fingerprint(program)}
    monkeypatch.setattr(program._lowering, "_compiler_options_kvs", (("xla_tpu_x", True),))
    found.add(fingerprint(program))
    monkeypatch.setattr(module, "_versions", lambda: ["0.1", "0.2"])
    found.add(fingerprint(program))
    level = jax.config.jax_optimization_level
    try:
        jax.config.update("jax_optimization_level", "O0")
        found.add(fingerprint(program))
    finally:
        jax.config.update("jax_optimization_level", level)
    assert len(found) == 4


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORD", tmp_path / "programs.json")
    module.RECORD.write_text("{}")
    return module.RECORD


def test_what_is_on_record_is_not_compiled_again(record):
    seen = {}
    one = Programs("a test", "record", seen)
    assert one.facts("a test", "1", lambda: {"bytes": 5}) == {"bytes": 5}
    assert one.facts("another", "2", lambda: {"bytes": 6}) == {"bytes": 6}
    assert seen == {"a test": False, "another": False}
    assert len(record.read_text().splitlines()) == 4, "a line each: merges are easy"

    later = Programs("renamed", None, seen)
    assert later.facts("renamed", "1", lambda: pytest.fail("compiled again")) == {"bytes": 5}
    assert later.facts("changed", "3", lambda: {"bytes": 7}) == {"bytes": 7}
    assert seen["renamed"]
    assert not seen["changed"]
    assert set(json.loads(record.read_text())) == {"a test", "another"}, "only a recording run writes"
    module.write_record({}, only=["another"])
    assert set(json.loads(record.read_text())) == {"another"}


def test_all_compiles_what_is_on_record_and_finds_a_record_that_lies(record):
    Programs("a test", "record", {}).facts("a test", "1", lambda: {"bytes": 5})
    everything = Programs("a test", "all", {})
    assert not everything.knows("1")
    with pytest.raises(AssertionError, match="the record says otherwise of a test"):
        everything.facts("a test", "1", lambda: {"bytes": 6})


def test_what_compiling_shows_is_read_off_the_program():
    found = module.what_compiling_shows(lowered().compile())
    assert found["kernels"] == {"twice": 1}
    assert found["bytes"]["argument"] == found["bytes"]["output"] == 128 * 128 * 4


@pytest.mark.parametrize(
    ("more", "keyword", "status"), [(0, "", 0), (1, "", pytest.ExitCode.TESTS_FAILED), (1, "a part", 0)]
)
def test_a_run_of_all_tests_that_compiles_many_programs_fails(more, keyword, status):
    seen = dict.fromkeys(range(100), True)
    seen |= dict.fromkeys(range(100, 100 + module.MOST_UNRECORDED + more), False)
    config = types.SimpleNamespace(
        stash={conftest.SEEN: seen},
        args_source=pytest.Config.ArgsSource.TESTPATHS,
        option=types.SimpleNamespace(
            programs=None, keyword=keyword, markexpr="", collectonly=False, deselect=None
        ),
    )
    session = types.SimpleNamespace(config=config, exitstatus=0)
    conftest.pytest_sessionfinish(session, 0)
    assert session.exitstatus == status

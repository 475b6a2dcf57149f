"""The selftest agrees with sound operations, and finds out unsound ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from gpu_description import AMPERE, HOPPER, on_gpu

import mc_jax
from mc_jax import _selftest
from mc_jax._commands import COMMANDS


@pytest.fixture
def only_dense_reads(monkeypatch):
    (case,) = (case for case in _selftest.cases() if case.name == "gated_state_read, matrices")
    monkeypatch.setattr(_selftest, "cases", lambda: [case])
    return case


@pytest.mark.usefixtures("only_dense_reads")
def test_operations_that_agree_with_the_reference_pass(capsys):
    assert mc_jax.selftest()
    assert "all 2 agree" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda out: out * 1.02, lambda out: out.at[0, 0].set(jnp.nan)])
def test_an_operation_that_differs_is_told(only_dense_reads, wrong, monkeypatch, capsys):
    def run(*arguments, implementation):
        out = only_dense_reads.run(*arguments, implementation=implementation)
        return out if implementation == "reference" else wrong(out)

    case = _selftest.Case("off by a little", run, only_dense_reads.arguments)
    monkeypatch.setattr(_selftest, "cases", lambda: [case])
    with pytest.raises(SystemExit) as exit_code:
        COMMANDS["selftest"]([])
    assert exit_code.value.code == 1
    assert "2 of 2 differ" in capsys.readouterr().out


def test_a_kernel_that_does_not_run_hides_no_other(only_dense_reads, monkeypatch, capsys):
    def run(*arguments, implementation):
        if implementation != "reference":
            raise RuntimeError("no such instruction\nand 40 lines more")
        return only_dense_reads.run(*arguments, implementation=implementation)

    broken = _selftest.Case("broken", run, only_dense_reads.arguments)
    monkeypatch.setattr(_selftest, "cases", lambda: [broken, only_dense_reads])
    monkeypatch.setenv("COLUMNS", "200")
    assert not mc_jax.selftest()
    out = capsys.readouterr().out
    assert "FAILS: RuntimeError: no such instruction" in out
    assert "40 lines more" not in out
    assert "2 of 4 differ" in out


def test_every_operation_is_checked_in_all_its_versions():
    checked = {}
    for case in _selftest.cases():
        versions = case.versions("cpu", jnp.float32)
        checked.setdefault(case.name.partition(",")[0], set()).update(versions)
        for version in ("reference", *versions):
            jax.eval_shape(functools.partial(case.run, implementation=version), *case.arguments)
    routed = {"gather", "blocks", "ragged_dot"}
    others = ("chunk_memory", "decode_step", "deep_memory", "gated_state_read", "short_convolution")
    assert checked == {"routed_state_read": routed} | {name: {"xla"} for name in others}


def test_an_operation_without_gradients_is_compared_by_its_values():
    (case,) = (case for case in _selftest.cases() if case.name == "decode_step, titans")
    check = _selftest._check(case, "xla", jnp.bfloat16, (5e-3, 0.0))
    assert check.passed
    assert check.gradients is None
    assert check.values > 0


def test_every_version_is_one_that_the_operation_knows():
    with on_gpu():  # all but the TPU's
        for case in _selftest.cases():
            arguments = [x.astype(jnp.bfloat16) if _selftest._is_tokens(x) else x for x in case.arguments]
            for version in case.versions("gpu", jnp.bfloat16):
                jax.eval_shape(functools.partial(case.run, implementation=version), *arguments)


@pytest.mark.parametrize(("kind", "hopper"), [(HOPPER, True), (AMPERE, False)])
def test_on_gpus_their_versions_are_checked_where_they_run(kind, hopper):
    with on_gpu(kind):
        versions = {case.name: case.versions("gpu", jnp.bfloat16) for case in _selftest.cases()}
        (dense,) = (case for case in _selftest.cases() if case.name == "gated_state_read, matrices")
        assert "gpu" not in dense.versions("gpu", jnp.float32)
    checked = {name for name, names in versions.items() if "gpu" in names}
    forms = {"chunk_memory, linear", "chunk_memory, swla", "chunk_memory, delta"}
    assert checked == (forms | {"gated_state_read, matrices"} if hopper else forms)

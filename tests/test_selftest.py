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


def test_every_operation_with_a_gradient_is_checked():
    names = {case.name.partition(",")[0] for case in _selftest.cases()}
    assert names == {"chunk_memory", "deep_memory", "gated_state_read", "routed_state_read"}


def test_every_version_is_one_that_the_operation_knows():
    with on_gpu():  # all but the TPU's
        for case in _selftest.cases():
            arguments = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 4 else x, case.arguments)
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

"""The selftest agrees with sound operations, and finds out unsound ones."""

import jax.numpy as jnp
import pytest

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

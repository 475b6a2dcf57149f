"""Memory Caching learns to recall what its base memory forgets."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import mqar, mqar_table
from experiments.mqar import Cell, main, run
from experiments.mqar_table import cells, finished, table


@pytest.fixture
def optimized():
    """With all of XLA's optimisations, which tests do without: here it is running that takes long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def fewer_symbols(monkeypatch):
    """The task with half of its symbols, which a model with cached memories learns in half of the steps."""
    monkeypatch.setattr(mqar, "VOCAB", 64)
    monkeypatch.setattr(mqar, "LONG_PAIRS", 16)  # as many as there are keys for


@pytest.mark.slow
@pytest.mark.usefixtures("optimized", "fewer_symbols")
def test_cached_memories_recall_far_more_than_their_base():
    base, gated = (run(Cell(aggregation=name, seeds=1, steps=500)).accuracy[0] for name in ("none", "gated"))
    assert gated >= base + 0.3, f"gated recalls {gated:.3f}, its base {base:.3f}"


def test_the_table_names_every_memory_and_aggregation_once():
    rows = list(cells().values())
    assert len(set(rows)) == len(rows)
    assert {cell.memory for cell in rows} == {"attention", "linear", "swla", "delta", "dla", "titans"}
    for memory in ("linear", "swla", "delta", "dla", "titans"):
        found = {cell.aggregation for cell in rows if cell.memory == memory}
        assert found >= {"none", "residual", "gated", "sparse", "average"}


def test_the_table_in_results_is_that_of_the_rows_that_were_run():
    results = (Path(mqar_table.__file__).parent / "RESULTS.md").read_text()
    assert set(finished()) == set(cells()), "python -m experiments.mqar_table runs what is missing"
    assert table(finished()) in results, "python -m experiments.mqar_table writes the table anew"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aggregation", "gatted"], "gated"),
        (["--memory", "linear", "--mlp"], "memory 'linear' is a matrix"),
        (["--steps", "0"], "set both to 1 or more"),
    ],
)
def test_what_does_not_go_together_ends_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_it_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.mqar", "--memory", "attention", "--seeds", "1", "--steps", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cache bytes    36864" in done.stdout

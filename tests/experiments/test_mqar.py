"""Memory Caching learns to recall what its base memory forgets."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import mqar_routers, mqar_table
from experiments._mqar_found import _force, _hits, asked_of, chance
from experiments._recall_table import RESULTS
from experiments.mqar import TASKS, Cell, RecallModel, main, run
from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.data.mqar import IGNORED, MqarBatch

TABLES = {table.TABLE.name: table.TABLE for table in (mqar_table, mqar_routers)}


@pytest.fixture
def optimized():
    """With all of XLA's optimisations, which tests do without: here it is running that takes long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def fewer_symbols(monkeypatch):
    """The task with half of its symbols, which a model with cached memories learns in half of the steps."""
    # As many long pairs as there are keys for.
    monkeypatch.setitem(TASKS, "mqar", dataclasses.replace(TASKS["mqar"], vocab_size=64, long_pairs=16))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized", "fewer_symbols")
def test_cached_memories_recall_far_more_than_their_base():
    base, gated = (run(Cell(aggregation=name, seeds=1, steps=500)).accuracy[0] for name in ("none", "gated"))
    assert gated >= base + 0.3, f"gated recalls {gated:.3f}, its base {base:.3f}"


def test_the_table_names_every_memory_and_aggregation_once():
    rows = list(mqar_table.TABLE.cells.values())
    assert len(set(rows)) == len(rows)
    assert {cell.memory for cell in rows} == {"attention", "linear", "swla", "delta", "dla", "titans"}
    for memory in ("linear", "swla", "delta", "dla", "titans"):
        found = {cell.aggregation for cell in rows if cell.memory == memory}
        assert found >= {"none", "residual", "gated", "sparse", "average"}


def test_the_table_of_recall_has_been_run_whole():
    table = mqar_table.TABLE
    assert set(table.finished()) == set(table.cells), "python -m experiments.mqar_table runs what is missing"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_results_is_that_of_the_rows_that_were_run(name):
    table = TABLES[name]
    assert set(table.finished()) <= set(table.cells), f"rows of the table {name} that none of its cells made"
    assert table.text() in RESULTS.read_text(), f"make() of the table {name} writes it anew"


# Segments of four tokens: two pairs; one pair; questions for the third and the second pair.
ASKED = asked_of(
    MqarBatch(
        np.array([[1, 11, 2, 12, 3, 13, 0, 0, 3, 0, 2, 0]], np.int32),
        np.array([[IGNORED] * 8 + [13, IGNORED, 12, IGNORED]], np.int32),
    ),
    segment_length=4,
)


def test_the_segment_of_an_answer_is_that_of_its_pair():
    assert ASKED.segment[0, [8, 10]].tolist() == [1, 0]
    assert np.flatnonzero(ASKED.is_cached).tolist() == [8, 10]
    assert chance(ASKED, 4) == 1 / 2, "two segments have ended"


def test_a_hit_is_the_largest_gate_on_the_segment_and_a_miss_may_still_read_it():
    gates = np.zeros((1, 12, 1, 3), np.float32)
    gates[0, 8, 0] = [0.2, 0.5, 0.0]
    gates[0, 10, 0] = [0.3, 0.4, 0.0]
    online = 1 - gates.sum(-1)
    assert [float(share[0]) for share in _hits(Gates(online, gates), ASKED, 3)] == [0.5, 1.0]
    chosen = Selection(online, gates[..., 1:2], jnp.ones((1, 12, 1, 1), jnp.int32))
    assert [float(share[0]) for share in _hits(chosen, ASKED, 3)] == [0.5, 0.5]


def test_a_forced_layer_reads_the_wanted_segments_and_all_else_as_before():
    cell, tokens = Cell(), np.zeros((1, 24), np.int32)
    tokens[0, [0, 16]] = 5
    labels = np.where(np.arange(24) == 16, 7, IGNORED)[None]
    asked = asked_of(MqarBatch(tokens, labels), TASKS[cell.task].segment)
    graph, state = nnx.split(RecallModel(cell, rngs=nnx.Rngs(params=0)))

    def gates(state, forced):
        model = nnx.merge(graph, state)
        if forced:
            _force(model.second, asked, TASKS[cell.task].segment)
        return model.read(tokens, None)[1][1]

    before, after = (jax.jit(gates, static_argnums=1)(state, forced) for forced in (False, True))
    np.testing.assert_allclose(after.cached[0, 16, 0], [1, 0, 0], atol=1e-6)
    others = np.arange(24) != 16
    np.testing.assert_allclose(after.cached[:, others], before.cached[:, others], atol=1e-6)
    assert np.all(before.cached[0, 16, 0, :2] > 0.1), "a new router reads all alike"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aggregation", "gatted"], "gated"),
        (["--memory", "linear", "--mlp"], "memory 'linear' is a matrix"),
        (["--steps", "0"], "set both to 1 or more"),
        (
            ["--aggregation", "none", "--router-dim", "4"],
            "router_dim 4 has no effect with aggregation 'none'",
        ),
        (
            ["--aggregation", "residual", "--router-keys", "keys"],
            "router_keys has no effect with aggregation",
        ),
        (["--at-once"], "at_once has no effect with aggregation 'gated'"),
        (["--memory", "attention", "--top-k", "2"], "top_k has no effect with memory 'attention'"),
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

"""A sweep: which cells it has, each measured once however often it is ended, and what its tables say."""

import csv
import json
import random
import time
import types

import jax
import pytest
from training_process import start
from untrained import kept_run

from mc_jax.cli import main
from mc_jax.evaluation.core import held_out_text
from mc_jax.evaluation.sweep import runner
from mc_jax.evaluation.sweep.claim import claimed
from mc_jax.evaluation.sweep.grid import Axes, grid_of
from mc_jax.evaluation.sweep.runner import Source, run_sweep
from mc_jax.evaluation.sweep.table import rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    kept_run(folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that tests have one: more take longer to compile."""
    seen = types.SimpleNamespace(devices=lambda: jax.devices()[:1], set_mesh=jax.set_mesh)
    monkeypatch.setattr("mc_jax.evaluation.devices.jax", seen)


SOURCE = Source(step=None, text_of=lambda run: held_out_text(run.dataset, run.folder))
SMALL = Axes(aggregation=("gated", "none"), mode=("windows", "by-position"))


def grid(folder, axes=SMALL):
    return grid_of([str(folder / "run")], axes)


def described(cells) -> list[tuple]:
    names = ("mode", "aggregation", "segment_length", "top_k", "segmentation", "context_length", "max_cached")
    return [tuple(cell.settings().get(name) for name in names) for cell in cells]


def test_every_combination_is_a_cell_once_and_what_is_left_out_is_told(folder):
    axes = Axes(
        context_length=(16, 32),
        segment_length=(4, 8),
        aggregation=("gated", "sparse", "none"),
        top_k=(1, 2),
        segmentation=("constant", "logarithmic"),
    )
    found = grid(folder, axes)
    cells = described(found.cells)
    assert len(set(cells)) == len(cells)
    windows = {(length, segment) for length in (16, 32) for segment in (4, 8)}
    expected = {
        ("gated", segment, None, how, length) for how in axes.segmentation for length, segment in windows
    }
    expected |= {("sparse", segment, k, "constant", length) for k in (1, 2) for length, segment in windows}
    # Without caches a memory that goes on from segment to segment knows none.
    expected |= {("none", 8, None, "constant", length) for length in (16, 32)}
    assert {cell[1:6] for cell in cells} == expected
    assert found.cells[0].is_own, "the run as it was trained comes first"
    told = "\n".join(found.left_out)
    assert "top_k has no effect with aggregation 'gated'" in told
    assert "'logarithmic' is not defined with model.aggregation 'sparse'" in told
    assert sum(found.left_out.values()) + len(cells) >= 2 * 2 * 3 * 2 * 2


def test_a_run_is_measured_as_it_was_trained_unasked_and_nothing_else(folder):
    (own,) = grid(folder, Axes()).cells
    assert own.is_own
    assert own.changes == {}
    assert grid(folder, Axes(aggregation=("gated",), context_length=(32,))).cells[0].changes == {}
    assert grid(folder, Axes(aggregation=("gated",), context_length=(32,))).left_out == {}


def test_places_belong_to_a_stream_and_windows_do_not(folder):
    found = grid(
        folder,
        Axes(
            mode=("windows", "stream"),
            context_length=(16, 32),
            max_cached=(2,),
            aggregation=("gated", "none"),
        ),
    )
    assert sorted(described(found.cells), key=str) == sorted(
        [
            ("windows", "gated", 8, None, "constant", 32, None),
            ("windows", "gated", 8, None, "constant", 16, None),
            ("windows", "none", 8, None, "constant", 16, None),
            ("windows", "none", 8, None, "constant", 32, None),
            ("stream", "gated", 8, None, "constant", None, None),
            ("stream", "gated", 8, None, "constant", None, 2),
            ("stream", "none", 8, None, "constant", None, None),
        ],
        key=str,
    )


def test_windows_of_all_lengths_score_the_same_last_tokens(folder):
    found = grid(folder, Axes(mode=("last-k",), context_length=(16, 64)))
    assert {(cell.last_k, cell.first) for cell in found.cells} == {(8, 56)}, "half of 16; 64 less 8"


def test_what_needs_weights_that_are_not_there_is_left_out(tmp_path):
    run = kept_run(tmp_path, aggregation="none")
    found = grid_of([str(run)], Axes(aggregation=("gated", "residual")))
    assert [cell.config.model.aggregation for cell in found.cells] == ["none", "residual"]
    assert "needs weights that" in next(iter(found.left_out))


def test_cells_of_one_program_stand_together(folder):
    found = grid(folder)
    groups = found.groups()
    assert [len(group) for group in groups] == [2, 2], "each aggregation in two modes"
    assert len({group[0].program for group in groups}) == len(groups)


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """What the small sweep finds if nothing goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        seen = types.SimpleNamespace(devices=lambda: jax.devices()[:1], set_mesh=jax.set_mesh)
        patch.setattr("mc_jax.evaluation.devices.jax", seen)
        return run_sweep(grid(folder), tmp_path_factory.mktemp("unbroken"), SOURCE)


def figures(outcome) -> list[dict]:
    """Rows without what a clock says."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows_of(outcome)]


def test_a_row_has_its_figures_errors_costs_and_command(folder, unbroken):
    rows = rows_of(unbroken)
    assert len(rows) == 4
    own, *others = [row for row in rows if row["mode"] == "windows"]
    assert own["is_own"]
    assert own["less_own_loss"] is None
    off = next(row for row in others if row["aggregation"] == "none")
    assert off["less_own_loss"] == pytest.approx(off["loss"] - own["loss"], abs=1e-9)
    assert 0 < off["less_own_loss_standard_error"] < off["loss_standard_error"], "the pairs vary less"
    assert off["tokens"] == own["tokens"]
    # Two heads of 8 x 8 numbers of 4 bytes: one state, and for four segments a state and a router key each.
    assert off["memory_bytes"] == 2 * 4 * 64
    assert own["memory_bytes"] == 2 * 4 * (64 + 4 * (64 + 8))
    assert own["stored_bytes"] > own["memory_bytes"], "what a convolution keeps, and counts, are stored too"
    assert off["flops_per_token"] < own["flops_per_token"]
    assert off["router_cached_share"] is None
    assert 0 < own["router_cached_share"] < 1
    assert off["command"].startswith(f"mc-jax eval {folder / 'run'} --step 2 --mode windows")
    assert "--model.aggregation none" in off["command"]


def test_the_command_of_a_row_finds_its_figures(unbroken, capsys):
    row = rows_of(unbroken)[-1]
    assert main([*row["command"].split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == row["loss"]


class _Killed(BaseException):
    """Ends a sweep where it is, as a signal would."""


def test_a_sweep_ended_at_random_computes_no_cell_twice_and_ends_in_the_same_table(
    folder, unbroken, tmp_path, monkeypatch
):
    measured: list[str] = []
    measure, write = runner.measure_cell, runner.write_json
    random_places = random.Random(0)

    def told_of(cell, *arguments):
        values = measure(cell, *arguments)
        if left[0] == "measured":
            left.clear()
            left.append("")
            raise _Killed
        return values

    def written(path, values):
        write(path, values)
        measured.append(path.name)
        if random_places.random() < 0.5:
            raise _Killed

    left = [""]
    monkeypatch.setattr(runner, "measure_cell", told_of)
    monkeypatch.setattr(runner, "write_json", written)
    ended = 0
    for attempt in range(12):
        left[:] = ["measured" if attempt in (1, 3) else ""]
        try:
            outcome = run_sweep(grid(folder), tmp_path, SOURCE)
            break
        except _Killed:
            ended += 1
    assert ended >= 2
    assert len(measured) == len(set(measured)) == 4, "a cell that had its file was measured again"
    assert figures(outcome) == figures(unbroken)


def test_a_cell_that_fails_is_recorded_and_told_and_tried_again(folder, tmp_path, monkeypatch, capsys):
    measure = runner.measure_cell

    def fails_without_caches(cell, *arguments):
        if cell.config.model.aggregation == "none":
            raise RuntimeError("out of memory")
        return measure(cell, *arguments)

    words = [
        "sweep",
        str(folder / "run"),
        "--aggregation",
        "none",
        "gated",
        "--output",
        str(tmp_path / "dial"),
    ]
    monkeypatch.setattr(runner, "measure_cell", fails_without_caches)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "1 of 2 cells have no result" in told
    assert "RuntimeError: out of memory" in told
    (error,) = (tmp_path / "dial" / "cells").glob("*.error.json")
    assert json.loads(error.read_text())["settings"]["aggregation"] == "none"
    rows = list(csv.DictReader((tmp_path / "dial" / "results.csv").open()))
    assert [row["aggregation"] for row in rows] == ["gated"]
    assert "out of memory" in (tmp_path / "dial" / "dial.html").read_text()
    monkeypatch.setattr(runner, "measure_cell", measure)
    looked: list = []
    outcome = run_sweep(
        grid(folder, Axes(aggregation=("none",))), tmp_path / "dial", SOURCE, told=looked.append
    )
    assert [done.seconds is None for done in looked] == [True, False]
    assert outcome.failed == ()
    assert not error.exists()


def test_a_run_that_cannot_be_read_does_not_stop_the_others(folder, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_bytes((folder / "run" / "config.json").read_bytes())
    (tmp_path / "begun" / "tokenizer.json").write_bytes((folder / "run" / "tokenizer.json").read_bytes())
    runs = [str(tmp_path / "begun"), str(folder / "run")]
    outcome = run_sweep(grid_of(runs, Axes()), tmp_path / "dial", SOURCE)
    assert [values["run"] for values in outcome.results] == runs[1:]
    ((cell, error),) = outcome.failed
    assert (cell.run, "no complete checkpoint" in error) == (runs[0], True), error
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run_sweep(grid_of(runs[:1], Axes()), tmp_path / "dial", SOURCE)


def test_overwrite_measures_again_what_was_there(folder, tmp_path):
    axes = Axes(aggregation=("none",))
    run_sweep(grid(folder, axes), tmp_path, SOURCE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    looked: list = []
    run_sweep(grid(folder, axes), tmp_path, SOURCE, overwrite=True, told=looked.append)
    assert all(done.seconds is not None for done in looked)
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())
    run_sweep(grid(folder, axes), tmp_path, SOURCE, told=looked.append)
    assert all(done.seconds is None for done in looked[2:])


def test_another_checkpoint_or_text_is_another_cell(folder, tmp_path):
    for step in (1, 2):
        run_sweep(grid(folder, Axes()), tmp_path, Source(step=step, text_of=SOURCE.text_of))
    assert len(list(tmp_path.glob("cells/*.json"))) == 2


def test_a_claim_is_one_process_s_and_ends_with_its_block(tmp_path):
    with claimed(tmp_path / "a.claim") as first, claimed(tmp_path / "a.claim") as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path / "a.claim") as third:
        assert third
    assert not list(tmp_path.iterdir())


def test_two_processes_divide_a_sweep_and_one_takes_over_what_the_other_left(folder, unbroken, tmp_path):
    words = ("sweep", str(folder / "run"), "--aggregation", "gated", "none")
    words = (*words, "--mode", "windows", "by-position", "--output", str(tmp_path / "dial"))
    both = [start(tmp_path, *words, output=f"{number}.txt") for number in range(2)]
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("dial/cells/*.json")):
        assert time.monotonic() < deadline, [one.lines() for one in both]
        time.sleep(0.01)
    both[0].process.kill()
    assert both[1].end() == 0, both[1].lines()
    both[0].end()
    assert len(list(tmp_path.glob("dial/cells/*.json"))) == 4
    did = [line for one in both for line in one.lines() if "/4 " in line and "was there" not in line]
    cells = {line.rpartition(": ")[0].partition(" ")[2] for line in did}
    assert len(cells) == len(did), f"a cell was measured twice: {did}"
    assert len(did) >= 3, "the one that was killed can have written one cell without telling of it, no more"
    rows = list(csv.DictReader((tmp_path / "dial" / "results.csv").open()))
    expected = [row["bits_per_byte"] for row in rows_of(unbroken)]
    assert [float(row["bits_per_byte"]) for row in rows] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--output is missing"),
        (("--dry-run", "--overwrite"), "--overwrite has no effect with --dry-run"),
        (("--dry-run", "--max-cached", "2"), "--max-cached has no effect without --mode stream"),
        (("--dry-run", "--last-k", "2"), "--last-k has no effect without --mode last-k"),
        (("--dry-run", "--mode", "stream", "--stride", "2"), "--stride has no effect without --mode windows"),
        (("--dry-run", "--mode", "stream", "--when-full", "error"), "--when-full has no effect without"),
        (("--dry-run", "--top-k", "1", "1"), "--top-k has a value twice"),
        (("--dry-run", "--corpus", "a", "--text", "b.txt"), "--corpus has no effect with --text"),
    ],
)
def test_options_that_others_make_void_are_refused(folder, capsys, words, told):
    assert main(["sweep", str(folder / "run"), *words]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_dry_run_lists_the_cells_and_writes_nothing(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["sweep", str(folder / "run"), "--top-k", "1", "--aggregation", "sparse", "none", "--dry-run"])
        == 0
    )
    told = capsys.readouterr().out
    assert "3 cells of 3 compiled programs" in told
    assert "(as trained)" in told
    assert "left out, 1 combination: the same as another cell" not in told, "none with a top k is there once"
    assert not list(tmp_path.iterdir())

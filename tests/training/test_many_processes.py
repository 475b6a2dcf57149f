"""Several processes train as one does, stop together, and none waits for one that is gone."""

import json
import os
import pathlib
import shutil
import signal

import pytest
from training_process import start_two, wait_for_step
from workplaces import make_workplace, tiny_run

from mc_jax._recipes import load_recipe
from mc_jax.training import loop

pytestmark = pytest.mark.xdist_group("many processes")  # one worker: they share a run

STEPS = 24
RUN = tiny_run(steps=STEPS, warmup_steps=4, checkpoint_every=5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("many"), RUN)


@pytest.fixture(scope="module")
def whole(workplace):
    """The steps of a run of one process that nothing disturbed."""
    train_alone(workplace, "whole")
    return steps_of(workplace, "whole")


def train_alone(workplace: pathlib.Path, name: str) -> int:
    """Train, or go on, in this process with its eight devices."""
    return loop.train(load_recipe(str(workplace / "tiny.py"))[2], workplace / "runs" / name)


def start(workplace: pathlib.Path, name: str, **of_second):
    return start_two(workplace, "train", "tiny.py", "--name", name, output=name, **of_second)


def steps_of(workplace: pathlib.Path, name: str) -> list[dict]:
    return [
        json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]


def newest_checkpoint(run: pathlib.Path) -> int:
    return max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())


def must_be_the_same(steps: list[dict], whole: list[dict]) -> None:
    assert [line["step"] for line in steps] == [line["step"] for line in whole]
    for line, expected in zip(steps, whole, strict=True):
        # Adam blows up what the order of sums rounds, and gradients show it more than losses.
        names = {"loss": 1e-5, "grad_norm": 1e-5} if line["step"] <= 3 else {"loss": 1e-3}
        for name, relative in names.items():
            assert line[name] == pytest.approx(expected[name], rel=relative), f"{name} of step {line['step']}"


def must_have_measured(workplace: pathlib.Path, name: str) -> None:
    """See that the processes together measured what one alone did at the end, on the same text."""
    result = json.loads((workplace / "runs" / name / "result.json").read_text())
    measured = {line["step"]: line for line in steps_of(workplace, name) if "held_out_loss" in line}
    assert list(measured) == [20, STEPS]
    for field in ("loss", "bits_per_byte"):
        assert measured[STEPS][f"held_out_{field}"] == pytest.approx(result["held_out"][field], rel=1e-6)


MEASURED = ("--evaluation.every", "20", "--evaluation.batch-size", "3")


def test_two_processes_train_as_one_and_the_first_one_alone_tells(workplace, whole):
    first, second = start_two(workplace, "train", "tiny.py", "--name", "two", *MEASURED, output="two")
    assert (first.end(), second.end()) == (0, 0), first.lines() + second.lines()
    must_be_the_same(steps_of(workplace, "two"), whole)
    must_have_measured(workplace, "two")
    assert "2 devices of 2 processes" in first.lines()[0]
    assert first.lines()[-1] == "report: runs/two/report.html"
    assert (workplace / "runs" / "two" / "report.html").exists()
    assert second.lines() == [], "only process 0 prints"
    events = [path.suffix for path in (workplace / "runs" / "two" / "tensorboard").iterdir()]
    assert sorted(events) == [".from0", ".hparams"], "only process 0 writes"


def test_two_processes_that_share_rows_train_as_one(workplace, whole):
    mesh = ("--mesh.fsdp", "1", "--mesh.sequence", "2", *MEASURED)
    processes = start_two(workplace, "train", "tiny.py", "--name", "shared", *mesh, output="shared")
    assert [started.end() for started in processes] == [0, 0], processes[0].lines() + processes[1].lines()
    must_be_the_same(steps_of(workplace, "shared"), whole)
    must_have_measured(workplace, "shared")


def test_a_notice_to_one_stops_all_at_one_step_and_one_process_goes_on(workplace, whole):
    run = workplace / "runs" / "noticed"
    processes = start(workplace, "noticed")
    wait_for_step(run, 6, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [started.end() for started in processes] == [0, 0], processes[0].lines() + processes[1].lines()
    stopped = steps_of(workplace, "noticed")[-1]["step"]
    assert 6 <= stopped < STEPS
    assert newest_checkpoint(run) == stopped
    assert train_alone(workplace, "noticed") == STEPS
    must_be_the_same(steps_of(workplace, "noticed"), whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_which_names_it_and_two_go_on(workplace, whole, victim):
    name = f"killed {victim}"
    run = workplace / "runs" / name
    processes = start(workplace, name)
    wait_for_step(run, 7, processes)
    os.kill(processes[victim].pid, signal.SIGKILL)
    left = processes[1 - victim]
    assert left.end(seconds=60) == 1
    assert left.lines()[-1].startswith(f"mc-jax: error: process {victim} (")
    assert f"pid {processes[victim].pid}) is gone; start all processes again" in left.lines()[-1]
    assert processes[victim].end() == -signal.SIGKILL
    assert 5 <= newest_checkpoint(run) < STEPS, "the run goes on from a checkpoint, or this shows nothing"
    again = start(workplace, name)
    assert [started.end() for started in again] == [0, 0], again[0].lines() + again[1].lines()
    must_be_the_same(steps_of(workplace, name), whole)


def test_processes_that_were_started_differently_all_say_so(workplace):
    processes = start(workplace, "different", of_second=("--training.seed", "1"))
    told = "mc-jax: error: process 1 has other settings than process 0; start all with the same command"
    for started in processes:
        assert started.end() == 2
        assert started.lines() == [told]
    assert not (workplace / "runs" / "different").exists()


def test_what_process_0_refuses_ends_all_with_its_line(workplace):
    (workplace / "runs" / "taken").mkdir(parents=True)
    (workplace / "runs" / "taken" / "thesis.txt").write_text("mine")
    for started in start(workplace, "taken"):
        assert started.end() == 2
        assert started.lines() == [
            "mc-jax: error: runs/taken is not empty and not a run; choose another name with --name"
        ]


def test_a_process_that_fails_alone_ends_the_others_with_its_reason(workplace, tmp_path):
    shutil.copy(workplace / "tiny.py", tmp_path)
    first, second = start(workplace, "elsewhere", folder_of_second=tmp_path)
    assert (first.end(seconds=60), second.end()) == (1, 2)
    reason = "process 1 does not see runs/elsewhere/config.json, which process 0 has"
    assert reason in second.lines()[-1]
    assert first.lines()[-1].startswith("mc-jax: error: process 1 (")
    assert f"pid {second.pid}) failed: ValueError: {reason}" in first.lines()[-1]

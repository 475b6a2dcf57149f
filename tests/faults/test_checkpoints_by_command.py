"""Damage, readers beside a training, and numbers that are not finite, as the commands of mc-jax meet them."""

import json
import pathlib
import shutil
import time

import pytest
from etils import epath
from training_process import start
from workplaces import make_workplace, tiny_run

from mc_jax._recipes import load_recipe
from mc_jax.cli import main
from mc_jax.training.checkpoint import load_newest
from mc_jax.training.run import new_state

STEPS = 16
RUN = tiny_run(steps=STEPS, warmup_steps=4, checkpoint_every=1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("by command"), RUN)


@pytest.fixture(scope="module")
def trained(workplace):
    """A run that was trained while others read it, and the steps that they read."""
    _, like = new_state(load_recipe(str(workplace / "tiny.py"))[2], vocab_size=257)
    words = ("train", "tiny.py", "--name", "beside", "--training.keep-checkpoints", "2")
    training = start(workplace, *words, output="beside", seconds_a_step=0.3)
    run = epath.Path(workplace / "runs" / "beside")
    read = []
    while training.process.is_alive():
        loaded = load_newest(run, like)
        read += [] if loaded is None else [loaded.step]
        time.sleep(0.2)  # or the training has no processor
    assert training.end() == 0, training.lines()
    return pathlib.Path(run), read


@pytest.fixture
def run(trained, tmp_path) -> pathlib.Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(trained[0], tmp_path / "run")


def flip_a_bit(run: pathlib.Path, step: int) -> None:
    largest = max((run / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_readers_beside_a_training_disturb_it_no_more_than_it_them(trained):
    run, read = trained
    assert read == sorted(read)
    assert len(set(read)) > 2, f"the training was too fast to tell anything: {read}"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_flipped_bit_is_told_and_the_step_before_is_evaluated(run, capsys):
    flip_a_bit(run, STEPS)
    assert main(["eval", str(run), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["loss"] > 0
    (line,) = told.err.splitlines()
    assert f"step {STEPS} is no use (state/" in line
    assert line.endswith(f"holds other bytes than were saved); step {STEPS - 1} is used")


def test_where_all_are_damaged_a_line_says_so_and_a_launcher_need_not_try_again(run, capsys):
    for step in (STEPS - 1, STEPS):
        flip_a_bit(run, step)
    assert main(["generate", str(run), "--prompt", "the"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mc-jax: error: ")
    assert "has no whole checkpoint" in line


def test_checkpoints_are_listed(run, capsys):
    flip_a_bit(run, STEPS)
    (run / "checkpoints" / "99999").mkdir()
    assert main(["checkpoints", str(run), "--json"]) == 0
    before, damaged, empty = json.loads(capsys.readouterr().out)
    assert (before["step"], before["condition"], before["finite"]) == (STEPS - 1, "whole", True)
    assert before["bytes"] > 10_000
    assert 0 < before["loss"] < 6
    assert (damaged["step"], damaged["condition"]) == (STEPS, "damaged")
    assert "holds other bytes than were saved" in damaged["problem"]
    assert (empty["step"], empty["condition"], empty["bytes"]) == (99999, "unfinished", 0)
    assert main(["checkpoints", str(run)]) == 0
    assert "damaged: state/" in capsys.readouterr().out


@pytest.fixture(scope="module")
def diverged(workplace, trained):
    """Two runs that end in what is no number, started side by side; they find their programs compiled."""
    high = ("--name", "high", "--training.learning-rate", "1e3")
    last = ("--name", "last", "--training.learning-rate", "1e39", "--training.warmup-steps", "0")
    return [
        start(workplace, "train", "tiny.py", *high, output="high"),
        start(workplace, "train", "tiny.py", *last, "--training.steps", "1", output="last"),
    ]


def test_a_rate_far_too_high_leaves_a_finite_checkpoint_and_names_it(workplace, diverged):
    assert diverged[0].end() == 2
    line = diverged[0].lines()[-1]
    (step,) = [path.name for path in (workplace / "runs/high/checkpoints").iterdir() if path.name.isdecimal()]
    assert f"the checkpoint of step {step}" in line
    assert "with a lower --training.learning-rate" in line


def test_a_run_whose_very_last_state_is_not_finite_ends_with_an_error(diverged):
    assert diverged[1].end() == 2
    line = diverged[1].lines()[-1]
    assert "not all numbers of the state after step 1 are finite; there is no finite checkpoint" in line

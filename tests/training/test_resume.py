"""A run that is stopped in any way and started again must end as one that was not."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from workplaces import make_workplace, tiny_run

from mc_jax._recipes import load_recipe
from mc_jax.config import Config, EvaluationConfig
from mc_jax.parallel import make_mesh
from mc_jax.training import loop

pytestmark = pytest.mark.xdist_group("resume")  # one worker: they share a run

RUN = tiny_run(
    evaluation=EvaluationConfig(every=6, tokens=200, sample_tokens=8),
    steps=40,
    warmup_steps=4,
    checkpoint_every=5,
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("resume"), RUN, held=10)


@pytest.fixture(scope="module")
def whole(workplace):
    """The folder of a run that nothing disturbed."""
    subprocess.run(
        _command("whole"), cwd=workplace, env=_environment(workplace), check=True, capture_output=True
    )
    return workplace / "runs" / "whole"


def _command(name: str) -> list[str]:
    return [
        sys.executable, "-m", "mc_jax.cli", "train", "tiny.py", "--runs-dir", "runs", "--name", name,
    ]  # fmt: skip


def _environment(workplace: pathlib.Path) -> dict[str, str]:
    """Programs are kept for all tests, and compiled without most optimisations as in all tests."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _steps(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _without_times(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in ("tokens_per_second", "seconds")}


def _held_out(run: pathlib.Path) -> dict:
    from mc_jax.evaluation.perplexity import evaluate_run

    return evaluate_run(run)


def test_a_run_killed_half_way_ends_as_one_that_was_not(workplace, whole):
    killed = workplace / "runs" / "killed"
    process = subprocess.Popen(
        _command("killed"),
        cwd=workplace,
        env=_environment(workplace),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and len(
            (killed / "metrics.jsonl").read_text().split("\n")
        ) > 12:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(_lines(killed))
    assert 10 <= reached < 40, f"the kill came at step {reached}, too early or too late to tell anything"

    subprocess.run(
        _command("killed"), cwd=workplace, env=_environment(workplace), check=True, capture_output=True
    )
    assert [_without_times(line) for line in _steps(killed)] == [
        _without_times(line) for line in _steps(whole)
    ]
    assert [line["step"] for line in _steps(killed) if "held_out_loss" in line] == [*range(6, 37, 6), 40]
    assert _held_out(killed) == _held_out(whole)


def _lines(run: pathlib.Path) -> list[str]:
    """Whole lines of a file that may not be there yet, or may end in a torn one."""
    path = run / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_a_finished_run_started_again_trains_no_more_but_reports_again(workplace, whole):
    before = (whole / "metrics.jsonl").read_text()
    (whole / "report.html").unlink()
    subprocess.run(
        _command("whole"), cwd=workplace, env=_environment(workplace), check=True, capture_output=True
    )
    assert (whole / "metrics.jsonl").read_text() == before
    assert (whole / "report.html").exists()


@pytest.fixture
def one_device(monkeypatch):
    """Three trainings in this process, on one device, compile their programs once."""
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.mark.usefixtures("one_device")
def test_a_run_made_longer_ends_as_one_that_was_meant_so_from_the_start(workplace, capsys):
    long, short = (_constant(workplace, steps) for steps in (12, 6))
    loop.train(long, workplace / "runs" / "long")
    loop.train(short, workplace / "runs" / "longer")
    capsys.readouterr()
    assert loop.train(long, workplace / "runs" / "longer") == 12
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("longer goes on with other settings from step 6: training.steps 6 -> 12")
    names = ("step", "tokens", "loss", "grad_norm")
    long_steps, longer_steps = (
        [{name: line[name] for name in names} for line in _steps(workplace / "runs" / run)]
        for run in ("long", "longer")
    )
    assert longer_steps == long_steps


def _constant(workplace: pathlib.Path, steps: int) -> Config:
    config = load_recipe(str(workplace / "tiny.py"))[2]
    training = dataclasses.replace(config.training, steps=steps, schedule="constant")
    return dataclasses.replace(config, training=training)

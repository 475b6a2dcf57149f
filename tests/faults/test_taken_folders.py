"""A run whose folder is taken, overwritten, full or gone: one line, nothing lost, and it goes on."""

import dataclasses
import os
import shutil
import signal
import time

import pytest
from disturbed import STEPS, Disturbance, make_workplace, outcome, run

from mc_jax.training import _buckets

pytestmark = pytest.mark.xdist_group("faults")  # one worker: they share a run and its compiled programs

OVERWRITE = ("--overwrite",)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(workplace):
    """What a run that nothing disturbed leaves."""
    started = train(workplace, "whole")
    assert started.end() == 0, started.lines()
    return outcome(workplace / "runs" / "whole")


def train(workplace, name, disturbance=None, words=()):
    """Start to train a run, or to go on with it."""
    return run(workplace, "train", "tiny.py", "--name", name, *words, disturbance=disturbance)


def must_end_as(whole, workplace, name, *words) -> list[str]:
    """See that a command brings a run to the end of one that nothing disturbed; return what it said."""
    started = train(workplace, name, words=words)
    assert started.end() == 0, started.lines()
    assert outcome(workplace / "runs" / name) == whole
    return started.lines()


def test_a_second_start_of_a_running_name_is_refused_and_the_first_ends_as_if_alone(workplace, whole):
    hangs = Disturbance("mc_jax.training.loop:on_mesh", (), entry=5, hangs=True)
    first = train(workplace, "taken", hangs)
    metrics = workplace / "runs" / "taken" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline, first.lines()
        time.sleep(0.01)
    for words in ((), OVERWRITE, ("--training.steps", "12")):
        second = train(workplace, "taken", words=words)
        assert second.end() == 2
        (told,) = second.lines()
        assert told.startswith(f"mc-jax: error: process {first.pid} on "), told
        assert told.endswith("trains runs/taken; wait until it ends, or choose another --name"), told
    os.kill(first.pid, signal.SIGKILL)
    first.end()
    must_end_as(whole, workplace, "taken")


def test_an_overwriting_command_that_is_killed_and_sent_again_goes_on(workplace, whole):
    shutil.copytree(workplace / "runs" / "whole", workplace / "runs" / "again")
    killed = Disturbance("mc_jax.training.loop:on_mesh", (signal.SIGKILL,), entry=5)
    assert train(workplace, "again", killed, OVERWRITE).end() == -signal.SIGKILL
    assert not (workplace / "runs" / "again" / "report.html").exists(), "it began anew"
    lines = must_end_as(whole, workplace, "again", *OVERWRITE)
    assert "a run that --overwrite began and that has not ended: it goes on" in lines[0]
    assert "going on from step 2" in lines[1]


@dataclasses.dataclass(frozen=True)
class FullDisk:
    """A disk that is full when the metrics of a step are written."""

    step: int

    def __call__(self) -> None:
        write, written = _buckets.GrowingFile.write, 0

        def full(file: _buckets.GrowingFile, text: str) -> None:
            nonlocal written
            written += 1
            if written == self.step and file._file is not None:
                os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
            write(file, text)

        setattr(_buckets.GrowingFile, "write", full)  # noqa: B010


@dataclasses.dataclass(frozen=True)
class Deletion(Disturbance):
    """The deletion of a run's folder."""

    folder: str = ""

    def _send(self) -> None:
        while os.path.exists(self.folder):  # a checkpoint may be being written
            shutil.rmtree(self.folder, ignore_errors=True)
        super()._send()


def test_a_disk_that_fills_up_ends_a_run_in_one_line_and_keeps_its_checkpoint(workplace, whole):
    started = train(workplace, "full", FullDisk(5))
    assert started.end() == 2
    assert started.lines()[-1] == "mc-jax: error: runs/full/metrics.jsonl: No space left on device"
    assert not [line for line in started.lines() if "Traceback" in line]
    assert (workplace / "runs" / "full" / "checkpoints" / "2").exists()
    must_end_as(whole, workplace, "full")


def test_a_folder_that_is_deleted_while_it_trains_ends_the_run_in_one_line(workplace, whole):
    deletion = Deletion("mc_jax.training.loop:on_mesh", (), entry=STEPS - 1, folder="runs/gone")
    started = train(workplace, "gone", deletion)
    assert started.end() == 2
    told = "mc-jax: error: runs/gone was deleted or moved while it trained; what was not saved before is lost"
    # One in five times TensorStore's threads print beside it that asyncio's loop is closed.
    assert any(told in line for line in started.lines()), started.lines()
    frames = [line for line in started.lines() if 'File "' in line]
    assert all("asyncio/base_events.py" in line for line in frames), "a traceback of another kind"
    # A checkpoint that was being written may have made its folder anew: it counts whole, or not at all.
    started = train(workplace, "gone")
    assert started.end() == 0, started.lines()
    assert outcome(workplace / "runs" / "gone")["state"] == whole["state"]


def test_a_folder_that_is_deleted_under_a_save_that_never_ends_ends_the_run(workplace):
    saving = "mc_jax.training.checkpoint.writing:Checkpoints._write_down"
    started = train(workplace, "stuck", Deletion(saving, (), hangs=True, folder="runs/stuck"))
    assert started.end(60) == 2, "a thread that waits for the disk keeps the process alive"
    assert any("runs/stuck was deleted or moved while it trained" in line for line in started.lines())

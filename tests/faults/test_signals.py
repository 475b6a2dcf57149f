"""A run that signals stop, whatever it is doing, says so; the same command ends it as if none had come."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest
from disturbed import STEPS, Disturbance, Hangup, make_workplace, outcome, run, train

pytestmark = pytest.mark.xdist_group("faults")  # one worker: they share a run and its compiled programs

SAVING = "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize"
COUNTING = "mc_jax.training.checkpoint.writing:write_digest"
BEFORE = "before a step was done; the same command goes on"
SAVED = r"step (\d+) is saved; the same command goes on from there"
SAVED_WHILE_SAVING = r"step (\d+) is saved; the same command goes on (from there|with the evaluation)"
EVALUATION = f"step {STEPS} is saved; the same command goes on with the evaluation"
# From start to end, the function in which a signal comes, and what is said after "stopped by ".
PHASES = [
    (Disturbance("mc_jax.training.run_folder:open_data", ()), BEFORE),
    (Disturbance("mc_jax.training.run_folder:_make", ()), BEFORE),
    (Disturbance("mc_jax.training.step:token_losses", ()), BEFORE),  # while the first step is compiled
    (Disturbance("mc_jax.training.loop:on_mesh", (), entry=2), SAVED),
    (Disturbance(SAVING, ()), SAVED_WHILE_SAVING),
    (Disturbance(COUNTING, ()), SAVED_WHILE_SAVING),
    (Disturbance("mc_jax.evaluation.summary:measure_held_out", ()), EVALUATION),
    (Disturbance("mc_jax.evaluation.summary:write_report", ()), EVALUATION),
]
NAMES = {SIGINT: "Ctrl-C", SIGTERM: "SIGTERM", SIGHUP: "SIGHUP"}
CODES = {SIGINT: 130, SIGTERM: 0, SIGHUP: 129}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def whole(workplace):
    """What a run that nothing disturbed leaves."""
    started = train(workplace, "whole")
    assert started.end() == 0, started.lines()
    return outcome(workplace / "runs" / "whole")


def must_end_as(whole, workplace, name: str) -> None:
    """See that the same command, sent again, brings a run to the end of one that nothing disturbed."""
    started = train(workplace, name)
    assert started.end() == 0, started.lines()
    assert outcome(workplace / "runs" / name) == whole


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
def test_a_signal_in_each_phase_of_one_run_is_told_and_loses_nothing(workplace, whole, number):
    reached = 0
    for place, told in PHASES:
        started = train(workplace, number.name, place.with_signals(number))
        assert started.end(60) == CODES[number], (place, started.lines())
        found = re.fullmatch(f"(mc-jax: )?stopped by {NAMES[number]},? {told}", started.lines()[-1])
        assert found, (place, started.lines())
        if found.re.groups > 1:
            assert int(found[2]) > reached, "it saves what it has done since the signal before"
            reached = int(found[2])
    must_end_as(whole, workplace, number.name)


def test_a_kill_in_each_phase_of_one_run_loses_nothing(workplace, whole):
    for place, _ in PHASES:
        assert train(workplace, "killed", place.with_signals(SIGKILL)).end(60) == -SIGKILL, place
    must_end_as(whole, workplace, "killed")


@pytest.mark.slow
def test_a_run_that_is_ended_at_six_random_moments_loses_nothing(workplace, whole):
    moments = random.Random(0)
    for part, number in enumerate([SIGKILL, SIGTERM, SIGINT] * 2):
        started = train(workplace, "random", seconds_a_step=0.05)
        while not started.output.exists():
            time.sleep(0.01)
        time.sleep(0.5 * (part + moments.random()))  # each early and late in three seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, number)
        assert started.end(60) in (CODES.get(number, -number), 0), started.lines()
    must_end_as(whole, workplace, "random")


@pytest.mark.parametrize("where", ["mc_jax.training.loop:on_mesh", SAVING], ids=["step", "save"])
def test_a_second_ctrl_c_ends_a_run_that_hangs(workplace, whole, where):
    place = Disturbance(where, (SIGINT, SIGINT), entry=2, hangs=True)
    started = train(workplace, f"hangs {where[:6]}", place)
    assert started.end(60) == 130
    assert started.lines()[-2:] == [
        "mc-jax: stopping at the next step, which is saved; Ctrl-C ends at once",
        "mc-jax: ended at once by Ctrl-C; the same command goes on from the newest checkpoint",
    ]
    must_end_as(whole, workplace, f"hangs {where[:6]}")


def test_one_press_that_comes_twice_is_one(workplace, whole):
    place = Disturbance("mc_jax.training.loop:on_mesh", (SIGINT, SIGINT), entry=3, seconds_between=0.0)
    started = train(workplace, "twice", place)
    assert started.end(60) == 130
    assert started.lines()[-1].startswith("stopped by Ctrl-C, step 3 is saved"), started.lines()


def test_a_run_whose_terminal_is_closed_saves_and_ends(workplace, whole):
    started = train(workplace, "closed", Hangup("mc_jax.training.loop:on_mesh", (), entry=3))
    assert started.end(60) == 129
    assert (workplace / "runs" / "closed" / "checkpoints" / "3").exists()
    must_end_as(whole, workplace, "closed")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("eval", "runs/whole"), "mc_jax.evaluation.core:measure"),
        (("generate", "runs/whole", "--prompt", "the sea"), "mc_jax.inference.generate:load_run"),
        (("plan", "quickstart", "--topology", "v5e:2x2"), "mc_jax.planning.topology:read_topology"),
        (
            ("prepare", "text.txt", "--output", "made", "--tokenizer", "bytes"),
            "mc_jax.data.prepare:write_json",
        ),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_ctrl_c_ends_a_command_with_one_line_and_leaves_nothing_half_written(workplace, whole, words, where):
    before = sorted(workplace.rglob("*"))
    started = run(workplace, *words, disturbance=Disturbance(where, (SIGINT,), hangs=True))
    assert started.end(60) == 130
    assert started.lines() == ["mc-jax: interrupted"]
    assert [path for path in sorted(workplace.rglob("*")) if path not in before] == [started.output]


@pytest.mark.parametrize("module", ["mc_jax._commands", "jax", "tensorstore"])
def test_ctrl_c_while_modules_are_imported_ends_with_one_line(workplace, whole, module):
    program = (
        "import os, sys, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from mc_jax.cli import main\n"
        "sys.exit(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "eval", "runs/whole"],
        cwd=workplace, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "mc-jax: interrupted\n")

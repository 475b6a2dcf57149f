"""Two processes that train together hear of a signal to either, and neither waits for one that is gone."""

import os
import random
import time
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from disturbed import STEPS, Disturbance, HoldsPython, make_workplace, outcome
from training_process import start_two, wait_for_words

pytestmark = pytest.mark.xdist_group("faults of two")  # one worker: they share a run

NAME = "run"
STEP = Disturbance("mc_jax.training.loop:on_mesh", (), entry=2)
EVALUATION = Disturbance("mc_jax.evaluation.summary:measure_held_out", ())
# Process 1 does not evaluate; it waits for process 0.
WAITING = Disturbance("mc_jax.parallel.roll_call:RollCall.leave", ())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("two"))


def end(workplace, name, *before):
    """Exit codes and last lines of two processes that are disturbed."""
    started = start_two(
        workplace, "train", "tiny.py", "--name", name, output=name, before=before or (None, None)
    )
    codes = [each.end(90) for each in started]
    return codes, [(each.lines() or [""])[-1] for each in started]


def test_two_processes_that_signals_and_kills_disturb_end_as_two_that_none_did(workplace):
    # While process 1 cannot run Python, JAX's client in it aborts the process before the roll call can tell.
    codes, lines = end(workplace, NAME, STEP.with_signals(SIGKILL), HoldsPython(STEP.where, (), entry=2))
    assert codes == [-SIGKILL, 1], lines
    assert lines[1].startswith("mc-jax: error: process 0 ("), lines
    assert "is gone; start all processes again" in lines[1]

    codes, lines = end(workplace, NAME, STEP.with_signals(SIGINT), STEP.with_signals(SIGINT))
    assert codes == [130, 130], lines
    assert lines[0].startswith("stopped by Ctrl-C, step "), lines

    codes, lines = end(workplace, NAME, None, WAITING.with_signals(SIGTERM))
    assert codes == [0, 0], lines
    told = f"stopped by SIGTERM, step {STEPS} is saved; the same command goes on with the evaluation"
    assert lines[0].removeprefix("mc-jax: ") == told

    codes, lines = end(workplace, NAME, EVALUATION.with_signals(SIGTERM), None)
    assert codes == [0, 0], lines
    assert lines[0] == f"mc-jax: {told}"

    codes, lines = end(workplace, NAME, EVALUATION.with_signals(SIGKILL), None)
    assert codes == [-SIGKILL, 1], lines
    assert "is gone; start all processes again" in lines[1]

    assert end(workplace, NAME)[0] == [0, 0]
    assert end(workplace, "whole")[0] == [0, 0]
    assert outcome(workplace / "runs" / NAME) == outcome(workplace / "runs" / "whole")


def test_ctrl_c_to_one_of_two_stops_both(workplace):
    codes, lines = end(workplace, "one", None, STEP.with_signals(SIGINT))
    assert codes == [130, 130], lines
    assert lines[0].startswith("stopped by Ctrl-C, step "), lines


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_is_killed_at_random_moments_the_other_names_it(workplace, victim):
    moments = random.Random(victim)
    for number in range(2):
        name = f"random {victim} {number}"
        started = start_two(workplace, "train", "tiny.py", "--name", name, output=name)
        wait_for_words(started[0], "step ")
        time.sleep(0.4 * (number + moments.random()))  # one early, one late
        os.kill(started[victim].pid, SIGKILL)
        left = started[1 - victim]
        assert left.end(60) == 1, left.lines()
        assert f"process {victim} (" in left.lines()[-1], left.lines()

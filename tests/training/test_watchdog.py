"""A stuck step shows where all threads are, once, and goes on."""

import time

import pytest

from mc_jax.training.watchdog import Watchdog


@pytest.fixture
def told(tmp_path):
    with (tmp_path / "stderr").open("w+") as file:
        yield file


def text_of(file) -> str:
    file.seek(0)
    return file.read()


def get_stuck(seconds: float) -> None:
    time.sleep(seconds)


def test_a_stuck_step_is_told_once_with_all_stacks(told):
    with Watchdog(least=0.2, file=told) as watchdog:
        for step in range(1, 5):
            watchdog.done(step)
        get_stuck(1.0)
        watchdog.done(5)
        for step in range(6, 9):
            watchdog.done(step)
    text = text_of(told)
    assert text.count("all threads are here:") == 1
    assert "the step after step 4 has taken 0.2 s so far" in text
    assert "in get_stuck" in text


def test_each_stuck_step_is_told(told):
    with Watchdog(least=0.1, file=told) as watchdog:
        for step in range(1, 4):
            watchdog.done(step)
        for step in (4, 5):
            get_stuck(0.5)
            watchdog.done(step)
    assert text_of(told).count("all threads are here:") == 2


def test_compiling_in_the_first_step_is_not_being_stuck(told):
    with Watchdog(least=0.1, file=told) as watchdog:
        get_stuck(0.4)
        watchdog.done(1)
        watchdog.done(2)
    assert text_of(told) == ""


def test_steps_that_always_take_long_are_not_stuck(told):
    with Watchdog(least=0.01, file=told) as watchdog:
        for step in range(1, 5):
            get_stuck(0.1)
            watchdog.done(step)
        get_stuck(0.5)
    assert text_of(told) == ""


def test_what_is_measured_between_steps_is_neither_stuck_nor_a_step(told):
    with Watchdog(least=0.1, file=told) as watchdog:
        for step in range(1, 4):
            watchdog.done(step)
        watchdog.done(4, measures=True)
        get_stuck(0.4)
        watchdog.done(4)
        assert text_of(told) == ""
        get_stuck(0.4)
        watchdog.done(5)
    assert "the step after step 4 has taken 0.1 s so far" in text_of(told)

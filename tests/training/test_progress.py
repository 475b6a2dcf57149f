"""What a run prints, in a file and in a terminal."""

import io
import sys

import pytest

from mc_jax.training import progress as progress_module
from mc_jax.training.progress import Progress


def _metrics(step):
    return {
        "step": step,
        "loss": 1.25,
        "bits_per_byte": 1.8034,
        "tokens_per_second": 12345.0,
        "grad_norm": 1.0,
    }


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_the_first_line_the_last_and_one_for_each_twentieth(capsys, clock):
    with Progress(total_steps=1000, start_step=0, title="a run") as progress:
        for step in range(1, 1001):
            clock[0] += 0.1
            progress.update(_metrics(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a run"
    steps = [int(line.split("/")[0].removeprefix("step")) for line in lines[1:]]
    assert steps == [1, *range(50, 1001, 50)]
    assert lines[2] == "step   50/1000 · loss 1.250 · 1.803 bits/byte · 12.3k tokens/s · 1:35 left"


def test_a_held_out_result_is_printed_at_once_and_stays_in_the_line(capsys, clock):
    with Progress(total_steps=1000, start_step=0, title="measured") as progress:
        for step in range(1, 61):
            progress.update(_metrics(step) | ({"held_out_bits_per_byte": 2.0157} if step == 7 else {}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" · 12")[0].split(maxsplit=1)[1] for line in lines[2:4]] == [
        "7/1000 · loss 1.250 · 1.803 bits/byte · held out 2.016",
        "50/1000 · loss 1.250 · 1.803 bits/byte · held out 2.016",
    ]


def test_slow_steps_get_a_line_every_thirty_seconds(capsys, clock):
    with Progress(total_steps=10_000, start_step=0, title="slow") as progress:
        for step in range(1, 11):
            progress.update(_metrics(step))
            clock[0] += 10.0
    steps = [
        int(line.split("/")[0].removeprefix("step")) for line in capsys.readouterr().out.splitlines()[1:]
    ]
    assert steps == [1, 4, 7, 10]


def test_an_interrupted_run_still_prints_where_it_stopped(capsys, clock):
    def train():
        with Progress(total_steps=1000, start_step=100, title="interrupted") as progress:
            for step in range(101, 120):
                progress.update(_metrics(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "step  119/1000" in capsys.readouterr().out.splitlines()[-1]


def test_other_lines_keep_their_order_and_their_brackets(capsys, clock):
    with Progress(total_steps=2, start_step=0, title="title") as progress:
        progress.update(_metrics(1))
        progress.say("checkpoint [red] of step 1")
        progress.update(_metrics(2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "checkpoint [red] of step 1"
    assert lines[3].startswith("step 2/2")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_the_same_figures(monkeypatch, clock):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(total_steps=10, start_step=4, title="a [bold] run") as progress:
        progress.update(_metrics(5))
        clock[0] += 30.0
        progress.update(_metrics(6))
        progress.say("checkpoint of step 6")
    text = terminal.getvalue()
    assert "a [bold] run" in text
    assert "6/10 · loss 1.250 · 1.803 bits/byte · 12.3k tokens/s · 2:00 left" in text
    assert "━" in text, "no bar was drawn"


def test_a_log_with_forced_colours_gets_lines_and_no_bar(monkeypatch, capsys, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(total_steps=2, start_step=0, title="build log") as progress:
        progress.update(_metrics(1))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "step 1/2" in out

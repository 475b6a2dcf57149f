"""How a run tells where it is: a progress bar in a terminal, a line now and then in a file."""

import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

_LINES_IN_A_RUN = 20
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows steps, loss, bits per byte, tokens per second and the time left; a context manager.

    A terminal gets a bar. A file or a pipe gets plain lines: the first step, the last, and between them one
    for each 5 % of the steps, or after 30 s without a line.

    Args:
      total_steps: The step at which the run ends.
      start_step: Steps that are done before; 0 for a new run.
      title: The first line.
    """

    def __init__(self, total_steps: int, start_step: int, title: str):
        self._total_steps = total_steps
        self._start_step = start_step
        self._title = title
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._pending: str | None = None  # the newest line, while it is not printed
        self._held_out = ""  # the newest result
        self._printed_share = -1
        self._printed_time = 0.0
        # A terminal, not what FORCE_COLOR calls one: a bar would fill a build's log.
        console = Console(highlight=False)
        self._bar = _make_bar(console) if sys.stdout.isatty() and console.is_interactive else None

    def __enter__(self) -> Self:
        self.say(self._title)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                f"{self._start_step}/{self._total_steps} · compiling",
                total=self._total_steps,
                completed=self._start_step,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._pending is not None:
            self._print_pending(time.monotonic())

    def update(self, metrics: dict[str, Any]) -> None:
        """Show a finished step.

        Args:
          metrics: step, loss (nats per token), bits_per_byte, tokens_per_second, and of some steps
            held_out_bits_per_byte; others are not shown.
        """
        now, step = time.monotonic(), int(metrics["step"])
        if self._first is None:
            self._first = step, now
        is_measured = "held_out_bits_per_byte" in metrics
        if is_measured:
            self._held_out = f" · held out {float(metrics['held_out_bits_per_byte']):.3f}"
        numbers = " · ".join(
            (
                f"loss {float(metrics['loss']):.3f}",
                f"{float(metrics['bits_per_byte']):.3f} bits/byte{self._held_out}",
                f"{_short(float(metrics['tokens_per_second']))} tokens/s",
                f"{_clock(self._seconds_left(step, now))} left",
            )
        )
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, description=f"{step}/{self._total_steps} · {numbers}"
            )
            return
        width = len(str(self._total_steps))
        self._pending = f"step {step:>{width}}/{self._total_steps} · {numbers}"
        share = step * _LINES_IN_A_RUN // self._total_steps
        if is_measured or share > self._printed_share or now - self._printed_time >= _SECONDS_BETWEEN_LINES:
            self._printed_share = share
            self._print_pending(now)

    def say(self, text: str) -> None:
        """Print a line; above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _print_pending(self, now: float) -> None:
        assert self._pending is not None
        self.say(self._pending)
        self._pending, self._printed_time = None, now

    def _seconds_left(self, step: int, now: float) -> float | None:
        # Counted from the first update on: the time before it went into compiling.
        assert self._first is not None
        first_step, first_time = self._first
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total_steps - step)


def _make_bar(console: Console) -> RichProgress:
    return RichProgress(
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        console=console,
        expand=True,
    )


def _short(number: float) -> str:
    """Three digits or so: 950, 12.3k, 1.20M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

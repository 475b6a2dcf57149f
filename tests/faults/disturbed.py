"""Runs that are disturbed at a chosen place, and how to see that they end as one that was not."""

import ctypes
import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import pathlib
import signal
import termios
import time
from typing import Any

import numpy as np
import workplaces
from training_process import Started, start

from mc_jax import stop_signals

STEPS = 12
RUN = workplaces.tiny_run(steps=STEPS, warmup_steps=2, checkpoint_every=2)


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """Signals that a process sends itself when it enters a function."""

    where: str
    """module:function, or module:class.method."""
    signals: tuple[signal.Signals, ...]
    entry: int = 1
    """The entry at which the signals come, from 1."""
    hangs: bool = False
    """Whether the function never ends."""
    seconds_between: float = 1.0
    """Two that come closer together are one press of Ctrl-C."""

    def with_signals(self, *signals: signal.Signals) -> "Disturbance":
        """The same place, with other signals."""
        return dataclasses.replace(self, signals=signals)

    def __call__(self) -> None:
        module, _, path = self.where.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        original, entries = getattr(owner, name), 0

        def entered(*arguments: Any, **named: Any) -> Any:
            nonlocal entries
            entries += 1
            if entries == self.entry:
                self._send()
            return original(*arguments, **named)

        setattr(owner, name, entered)

    def _send(self) -> None:
        for number, sent in enumerate(self.signals):
            if number:
                time.sleep(self.seconds_between)
            os.kill(os.getpid(), sent)
            while stop_signals.current().heard is None:
                time.sleep(0.001)
        while self.hangs:
            time.sleep(60)


def make_workplace(folder: pathlib.Path) -> pathlib.Path:
    """A folder with a recipe of a run that takes a second, and its corpus."""
    return workplaces.make_workplace(folder, RUN, words=20, held=1)


class HoldsPython(Disturbance):
    """Python's lock, held for two seconds by C, as while a large array is copied."""

    def _send(self) -> None:
        ctypes.PyDLL(None).usleep(2_000_000)


class Hangup(Disturbance):
    """The loss of the terminal that a process prints to."""

    def __call__(self) -> None:
        os.setsid()
        os.environ["TERM"] = "dumb"  # no progress bar, whose bytes nobody would read
        mine, its = os.openpty()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        os.dup2(its, 1)
        os.dup2(its, 2)
        os.close(its)
        object.__setattr__(self, "_mine", mine)
        super().__call__()

    def _send(self) -> None:
        os.close(self._mine)  # the kernel sends SIGHUP
        while stop_signals.current().heard is None:
            time.sleep(0.001)


def train(
    workplace: pathlib.Path, name: str, disturbance: Disturbance | None = None, seconds_a_step: float = 0.0
) -> Started:
    """Start to train a run, or to go on with it."""
    words = ("train", "tiny.py", "--name", name)
    return run(workplace, *words, disturbance=disturbance, seconds_a_step=seconds_a_step)


def run(
    workplace: pathlib.Path,
    *words: str,
    disturbance: Disturbance | None = None,
    seconds_a_step: float = 0.0,
) -> Started:
    """Start any command."""
    output = f"{time.monotonic_ns()}.txt"
    return start(workplace, *words, output=output, before=disturbance, seconds_a_step=seconds_a_step)


def outcome(run: pathlib.Path) -> dict[str, Any]:
    """What must be the same, bit by bit, whatever disturbed a run on its way to its end."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{name: line[name] for name in ("step", "tokens", "loss", "grad_norm")} for line in lines]
    files = sorted(path.name for path in run.iterdir())
    return {"metrics": numbers, "files": files, "state": _digest(run)}


def _digest(run: pathlib.Path) -> str:
    """The SHA-256 of the trained weights."""
    import jax

    from mc_jax.training.run import load_run
    from mc_jax.training.step import split_model

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(split_model(load_run(run).model)[1]):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()

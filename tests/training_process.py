"""Real processes that run `mc-jax train`, forked from one that has imported what takes long to import."""

import atexit
import dataclasses
import gc
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable

import jax

from mc_jax import stop_signals
from mc_jax.cli import main
from mc_jax.stop_signals import StopSignals

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "training_process",
        "mc_jax._commands",
        "mc_jax.training.loop",
        "mc_jax.evaluation.summary",
        "mc_jax.evaluation._plots",
        "matplotlib.backends.backend_svg",
        "tensorboardX",
        "tyro._backends._tyro_backend",
    ]
)
_SECONDS_A_STEP = 0.1  # at least, so that a signal comes between two steps


@dataclasses.dataclass(frozen=True)
class Started:
    """A process that was started."""

    process: multiprocessing.process.BaseProcess
    output: pathlib.Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self, seconds: float = 300.0) -> int | None:
        """Its exit code; None if it has not ended after some time, and then it is ended."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        return code

    def lines(self) -> list[str]:
        """What it printed, without what the libraries tell of their connections."""
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        return [line for line in lines if "[Gloo]" not in line and "absl" not in line]


def start(
    folder: pathlib.Path,
    *words: str,
    output: str,
    before: Callable[[], None] | None = None,
    seconds_a_step: float = _SECONDS_A_STEP,
) -> Started:
    """Start `mc-jax WORDS` in a folder, with the cache of compiled programs that all tests share.

    Args:
      folder: where it runs.
      words: after the program's name.
      output: name of the file, in the folder, that has what it prints.
      before: called in the new process first, by its name.
      seconds_a_step: that each step takes at least.
    """
    path = folder / output
    compiled = jax.config.jax_compilation_cache_dir
    assert compiled is not None, "tests/conftest.py names the folder of compiled programs"
    arguments = (str(folder), str(path), compiled, words, before, seconds_a_step)
    process = _FORKS.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return Started(process, path)


def start_two(
    folder: pathlib.Path,
    *words: str,
    output: str,
    of_second: tuple[str, ...] = (),
    folder_of_second: pathlib.Path | None = None,
    before: tuple[Callable[[], None] | None, Callable[[], None] | None] = (None, None),
) -> list[Started]:
    """Start two processes that train together, the second one with more words, or elsewhere."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    together = (*words, "--processes.coordinator", coordinator, "--processes.count", "2", "--processes.index")
    return [
        start(folder, *together, "0", output=f"{output}.0.txt", before=before[0]),
        start(
            folder_of_second or folder,
            *together,
            "1",
            *of_second,
            output=f"{output}.1.txt",
            before=before[1],
        ),
    ]


def wait_for_words(started: Started, words: str) -> None:
    """Wait until a process has printed some words."""
    deadline = time.monotonic() + 300
    while not any(words in line for line in started.lines()):
        assert started.process.is_alive(), started.lines()
        assert time.monotonic() < deadline, started.lines()
        time.sleep(0.01)


def wait_for_step(run: pathlib.Path, step: int, processes: list[Started]) -> None:
    """Wait until a run has written the metrics of a step."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        told = "\n".join(line for started in processes for line in started.lines())
        assert all(started.process.is_alive() for started in processes), (
            f"it ended before step {step}:\n{told}"
        )
        assert time.monotonic() < deadline, f"it does not reach step {step}:\n{told}"
        time.sleep(0.01)


def _run(
    folder: str,
    output: str,
    compiled: str,
    words: tuple[str, ...],
    before: Callable[[], None] | None,
    seconds_a_step: float,
) -> None:
    gc.freeze()  # what was imported is no garbage, and stays shared with the fork server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    StopSignals().__enter__()  # whose output is there listens
    stop_signals._SECONDS_TO_END = 5.0  # where TensorStore waits for a folder that was deleted
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.chdir(folder)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from mc_jax.training import loop

    on_mesh = loop.on_mesh

    def on_mesh_slowly(*arguments):
        time.sleep(seconds_a_step)
        return on_mesh(*arguments)

    loop.on_mesh = on_mesh_slowly
    if before is not None:
        before()
    code = main(words)
    atexit._run_exitfuncs()  # JAX's are part of how a process ends, and a fork's end leaves them out
    sys.exit(code)

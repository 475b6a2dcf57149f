"""The record of a run: one JSON object a step in `metrics.jsonl`, the same scalars for TensorBoard.

A step's number counts the optimizer steps that are done, so the first line is step 1 and a checkpoint of
step k goes on with step k + 1. The framework's fields: step, tokens (seen so far), loss (nats per token),
bits_per_byte, learning_rate, grad_norm, tokens_per_second, seconds (since the run began); where held-out text
is measured, held_out_loss, held_out_bits_per_byte and, of a model with a router, router_* (docs/compare.md).
"""

import contextlib
import json
import math
from typing import Any, Self

from etils import epath

from mc_jax.data.files import make_folder, write_text
from mc_jax.training._buckets import GrowingFile
from mc_jax.training._tensorboard import EventFile, write_hparams

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends a run's metrics; a context manager.

    Opened at `start_step` k it first drops what an interrupted run wrote after step k, so a resumed run has
    one line a step, and tells TensorBoard to do the same. On a disk a kill loses at most the line it hits, in
    a bucket those of half a minute; a power cut none that a checkpoint has behind it.

    Args:
      run_dir: The run's folder; made where it is missing.
      start_step: Steps that the checkpoint has behind it; 0 for a new run.
      checkpoint_every: Steps between checkpoints, before each of which the file is flushed to the disk.

    Raises:
      ValueError: an older line of the file is not JSON.
    """

    def __init__(self, run_dir: epath.PathLike, start_step: int, *, checkpoint_every: int = 1):
        run_dir = epath.Path(run_dir)
        make_folder(run_dir)
        earlier = _drop_lines_after(run_dir, start_step)
        lost = start_step - len(earlier)
        if lost > 0:
            print(
                f"{run_dir / METRICS_FILE} lacks {lost} of the {start_step} steps before the checkpoint, "
                "as after a power cut; the run goes on without them",
                flush=True,
            )
        self.seconds: float = earlier[-1].get("seconds", 0.0) if earlier else 0.0
        """What the steps before took."""
        self._checkpoint_every = checkpoint_every
        self._last_step = start_step
        self._file = GrowingFile(run_dir / METRICS_FILE)
        self._tensorboard = EventFile(str(run_dir / TENSORBOARD_FOLDER), start_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After a full disk closing fails too: the first error is the one to be told.
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            try:
                self._file.close()
            finally:
                self._tensorboard.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics.

        Args:
          metrics: Numbers (Python's, NumPy's, or arrays of one element) by name, "step" among them. A number
            that is not finite is null in the file, which stays valid JSON.
        """
        values = {name: _python_number(value) for name, value in metrics.items()}
        step = int(values["step"])
        assert step > self._last_step, f"step {step} is written after step {self._last_step}"
        self._last_step = step
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        if step % self._checkpoint_every == 0:
            self._file.sync()
        self._tensorboard.write(step, {name: value for name, value in values.items() if name != "step"})


def record_hparams(
    run_dir: epath.PathLike, settings: dict[str, Any], results: dict[str, float | None], step: int
) -> None:
    """Tell TensorBoard's table of runs (HPARAMS) a run's settings and how it ended, in place of what it knew.

    Args:
      run_dir: The run's folder.
      settings: By name.
      results: Numbers by name; None, and one that is not finite, are left out.
      step: At which they were measured.
    """
    finite = {
        f"final/{name}": value
        for name, value in results.items()
        if value is not None and math.isfinite(value)
    }
    write_hparams(str(epath.Path(run_dir) / TENSORBOARD_FOLDER), settings, finite, step)


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """A run's metrics in the order of steps; [] where none were written.

    Args:
      run_dir: The run's folder.

    Returns:
      One dict of numbers a line. What was not finite is nan. A last line that a kill tore is left out, and
      so is what a power cut left as zeros.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    path = epath.Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # A whole file ends in a newline, so what follows the last one is empty, or torn.
    return [_parse(line, number, path) for number, line in enumerate(lines[:-1], start=1) if "\0" not in line]


def _drop_lines_after(run_dir: epath.Path, step: int) -> list[dict[str, Any]]:
    """Forget the metrics of later steps; return the others."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    text = "".join(
        json.dumps({name: None if math.isnan(value) else value for name, value in line.items()}) + "\n"
        for line in kept
    )
    write_text(path, text)
    return kept


def _parse(line: str, number: int, path: epath.Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number} of {path} is not JSON ({error.msg}); mend or delete that line"
        ) from error
    return {name: math.nan if value is None else value for name, value in values.items()}


def _python_number(value: Any) -> int | float:
    return value.item() if hasattr(value, "item") else value

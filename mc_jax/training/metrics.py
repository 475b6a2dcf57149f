"""The record of a run: one JSON object a step in `metrics.jsonl`, the same scalars for TensorBoard.

A step's number counts the optimizer steps that are done, so the first line is step 1 and a checkpoint of
step k goes on with step k + 1. The framework's fields: step, tokens (seen so far), loss (nats per token),
bits_per_byte, learning_rate, grad_norm, tokens_per_second, seconds (since the run began).
"""

import json
import math
from typing import Any, Self

from etils import epath

from mc_jax.training._buckets import GrowingFile

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends a run's metrics; a context manager.

    Opened at `start_step` k it first drops what an interrupted run wrote after step k, so a resumed run has
    one line a step, and tells TensorBoard to do the same. On a disk a kill loses at most the line it hits, in
    a bucket those of half a minute.

    Args:
      run_dir: The run's folder; made where it is missing.
      start_step: Steps that the checkpoint has behind it; 0 for a new run.

    Raises:
      ValueError: an older line of the file is not JSON.
    """

    def __init__(self, run_dir: epath.PathLike, start_step: int):
        # Imported here: it takes most of a second, which commands that only read metrics need not wait for.
        from tensorboardX import SummaryWriter

        run_dir = epath.Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(run_dir, start_step)
        self._last_step = start_step
        self._file = GrowingFile(run_dir / METRICS_FILE)
        # TensorBoard hides events from purge_step on that older files hold. The suffix keeps two runs that
        # start within one second from writing the same file.
        self._tensorboard = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER),
            purge_step=start_step + 1,
            flush_secs=30,
            filename_suffix=f".from{start_step}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
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
        for name, value in values.items():
            if name != "step":
                self._tensorboard.add_scalar(f"training/{name}", value, global_step=step)


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """A run's metrics in the order of steps; [] where none were written.

    Args:
      run_dir: The run's folder.

    Returns:
      One dict of numbers a line. What was not finite is nan. A last line that a kill tore is left out.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    path = epath.Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # A whole file ends in a newline, so what follows the last one is empty, or torn.
    return [_parse(line, number, path) for number, line in enumerate(lines[:-1], start=1)]


def _drop_lines_after(run_dir: epath.Path, step: int) -> None:
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
    text = "".join(
        json.dumps({name: None if math.isnan(value) else value for name, value in line.items()}) + "\n"
        for line in kept
    )
    # Written beside and renamed: a kill leaves the old file or the new one, never half of one.
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


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

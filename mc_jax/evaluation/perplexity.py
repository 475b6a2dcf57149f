"""The held-out result of a run: what a training ends with, and `mc-jax eval RUN` prints."""

from etils import epath

from mc_jax.evaluation.core import held_out_text, measure
from mc_jax.evaluation.measurement import Measurement
from mc_jax.evaluation.modes import Windows
from mc_jax.training.held_out import windows_of
from mc_jax.training.run import Run, load_run


def measure_held_out(run: Run) -> Measurement:
    """A run's result on its held-out text, in the windows that its config names.

    Raises:
      ValueError: the run's data has no held-out split.
    """
    windows = windows_of(run.config)
    mode = Windows(length=windows["context_length"], stride=windows["stride"])
    return measure(run, held_out_text(run.dataset, run.folder), mode)


def evaluate_held_out(run: Run) -> dict[str, float]:
    """The figures of `measure_held_out`."""
    return measure_held_out(run).figures()


def evaluate_run(run_dir: epath.PathLike) -> dict[str, float]:
    """What `evaluate_held_out` gives, from a run's folder and its newest checkpoint.

    Raises:
      ValueError: no such run, or no held-out data.
    """
    return evaluate_held_out(load_run(run_dir))

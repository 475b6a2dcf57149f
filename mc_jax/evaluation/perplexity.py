"""The held-out result of a run: what a training ends with, and `mc-jax eval RUN` prints."""

from etils import epath

from mc_jax.evaluation.core import held_out_text, measure
from mc_jax.evaluation.dial import turn
from mc_jax.evaluation.measurement import Measurement
from mc_jax.evaluation.modes import Windows
from mc_jax.evaluation.sums import difference
from mc_jax.facts import AGGREGATION_FACTS
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


def reads_cache(run: Run) -> bool:
    """Whether a run's model reads cached memories, which can be turned off."""
    model = run.config.model
    return "memory" in model.layer_pattern and AGGREGATION_FACTS[model.aggregation].reads_cache


def measure_caches(run: Run, own: Measurement) -> dict[str, float]:
    """What the caches of a run are worth on its held-out text: the same weights without them, paired.

    Args:
      run: one that reads cached memories.
      own: what `measure_held_out` gave of it.

    Returns:
      bits_per_byte_caches_off, and by how much that is more than the run's own: caches_worth, in bits per
      byte, with its standard error where there is one.
    """
    off = measure_held_out(turn(run, {"model.aggregation": "none"}))
    worth, error = difference(off.sums, own.sums)["bits_per_byte"]
    return {
        "bits_per_byte_caches_off": off.figures()["bits_per_byte"],
        "caches_worth": worth,
        **({} if error is None else {"caches_worth_standard_error": error}),
    }


def evaluate_run(run_dir: epath.PathLike) -> dict[str, float]:
    """What `evaluate_held_out` gives, from a run's folder and its newest checkpoint.

    Raises:
      ValueError: no such run, or no held-out data.
    """
    return evaluate_held_out(load_run(run_dir))

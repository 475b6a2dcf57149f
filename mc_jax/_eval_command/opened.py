"""Runs as the dial has them: their settings turned, and they themselves read back."""

from typing import TYPE_CHECKING

from mc_jax._eval_command.arguments import EvalArguments, changes

if TYPE_CHECKING:
    from mc_jax.config import Config
    from mc_jax.training.run import Run


def settings_of(folder: str, chosen: EvalArguments) -> "Config":
    """A run's settings, turned: what the dial refuses is told before anything is loaded."""
    from etils import epath

    from mc_jax.evaluation.dial import must_have_weights, turned_config
    from mc_jax.training.run import read_config

    trained, dialled = read_config(epath.Path(folder)), changes(chosen)
    turned = turned_config(trained, dialled)
    if dialled:
        must_have_weights(folder, trained, dialled)
    return turned


def open_run(folder: str, chosen: EvalArguments) -> "Run":
    """A run at the step that is asked for, turned as it is asked."""
    from mc_jax.evaluation.dial import turn
    from mc_jax.training.run import load_run

    run, dialled = load_run(folder, chosen.step), changes(chosen)
    return turn(run, dialled) if dialled else run

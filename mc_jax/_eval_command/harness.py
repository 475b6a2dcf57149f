"""Runs asked tasks of lm-eval."""

from collections.abc import Sequence
from pathlib import Path

from mc_jax._arguments import UsageError
from mc_jax._eval_command.arguments import EvalArguments
from mc_jax._eval_command.opened import open_run, settings_of
from mc_jax._eval_command.shown import print_turned
from mc_jax.stop_signals import current


def ask_lm_eval(chosen: EvalArguments, names: Sequence[str]) -> None:
    """Ask runs tasks of lm-eval, print its tables, and write its results and samples where that is asked.

    Args:
      chosen: the options.
      names: as lm-eval has them.
    """
    from mc_jax.data.files import json_text, remove_unfinished
    from mc_jax.evaluation.dial import turned_settings
    from mc_jax.evaluation.harness.tasks import (
        check_names,
        run_harness,
        table,
        without_samples,
        write_harness,
    )
    from mc_jax.evaluation.tasks.files import must_be_new

    runs = [Path(folder).name for folder in chosen.runs]
    if len(set(runs)) < len(runs):
        raise UsageError(f"runs are called {' '.join(runs)}; ask two of one name one by one")
    check_names(names)
    for folder in chosen.runs:
        settings_of(folder, chosen)
    if chosen.output is not None:
        must_be_new(chosen.output)
        current().tidy = remove_unfinished
    found = {}
    for name, folder in zip(runs, chosen.runs, strict=True):
        run = open_run(folder, chosen)
        found[name] = run_harness(run, names, chosen.lm_eval)
        if not chosen.json:
            print(f"{folder}, step {run.step}:\n{table(found[name])}")
            print_turned(folder, turned_settings(run))
    if chosen.output is not None:
        write_harness(found, chosen.output)
    if chosen.json:
        told = {name: without_samples(results) for name, results in found.items()}
        print(json_text(told if len(told) > 1 else told[runs[0]]))
    elif chosen.output is not None:
        print(f"results and samples: {chosen.output}")

"""What `mc-jax eval` does: a text measured, tasks asked, or what a router reads told."""

from collections.abc import Sequence

from mc_jax._arguments import UsageError, must_be_run, parse
from mc_jax._eval_command.arguments import EvalArguments, must_have_effect, of_lm_eval
from mc_jax._eval_command.harness import ask_lm_eval
from mc_jax._eval_command.router import tell_router
from mc_jax._eval_command.tasks import ask_tasks
from mc_jax._eval_command.text import measure_text


def evaluate(arguments: Sequence[str]) -> None:
    """Measure runs on text or in tasks, read as they were trained or otherwise."""
    chosen = parse(EvalArguments, arguments, program="mc-jax eval")
    if not chosen.runs:
        raise UsageError(
            "no run is named; write mc-jax eval RUN ..., for example mc-jax eval runs/quickstart"
        )
    for run in chosen.runs:
        must_be_run(run)
    must_have_effect(chosen)
    if chosen.inspect_router is not None:
        tell_router(chosen, chosen.inspect_router)
    elif chosen.tasks and (names := of_lm_eval(chosen.tasks)):
        ask_lm_eval(chosen, names)
    elif chosen.tasks is not None:
        ask_tasks(chosen, chosen.tasks)
    else:
        measure_text(chosen)

"""The command `mc-jax eval`: runs measured on a text or in tasks, read as they were trained or otherwise."""

from mc_jax._eval_command.command import evaluate
from mc_jax._eval_command.shown import shown

__all__ = ["evaluate", "shown"]

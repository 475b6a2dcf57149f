"""What a program will cost on a TPU that is not here, read off what the TPU's compiler makes of it."""

from mc_jax.planning.cost import keep_schedules
from mc_jax.planning.plan import Plan, plan

__all__ = ["Plan", "keep_schedules", "plan"]

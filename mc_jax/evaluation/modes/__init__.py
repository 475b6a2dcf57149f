"""The modes of evaluation, a file each: which targets are scored, each after which context."""

from mc_jax.evaluation.modes._choice import MODES, mode_of
from mc_jax.evaluation.modes._interface import Mode, Scored
from mc_jax.evaluation.modes._windows import score_windows
from mc_jax.evaluation.modes.by_position import ByPosition
from mc_jax.evaluation.modes.last_k import LastK
from mc_jax.evaluation.modes.stream import Stream
from mc_jax.evaluation.modes.windows import Windows

__all__ = ["MODES", "ByPosition", "LastK", "Mode", "Scored", "Stream", "Windows", "mode_of", "score_windows"]

"""Tasks of recall: each file tells how its samples are made, prompted and judged."""

from mc_jax.evaluation.tasks.key_value import KEY_VALUE
from mc_jax.evaluation.tasks.mad import MAD
from mc_jax.evaluation.tasks.mqar import MQAR
from mc_jax.evaluation.tasks.niah import NIAH
from mc_jax.evaluation.tasks.passkey import PASSKEY
from mc_jax.evaluation.tasks.sample import Ask, RowSample, RowTask, Sample, Task, TextSample, TextTask
from mc_jax.evaluation.tasks.squad_cloze import SQUAD_CLOZE
from mc_jax.evaluation.tasks.word_pairs import WORD_PAIRS

TASKS: dict[str, Task] = {
    task.name: task for task in (MQAR, *MAD, WORD_PAIRS, PASSKEY, *NIAH, SQUAD_CLOZE, KEY_VALUE)
}
"""All tasks by name."""

__all__ = ["TASKS", "Ask", "RowSample", "RowTask", "Sample", "Task", "TextSample", "TextTask"]

"""What lm-eval is asked to do; light to import, for commands that have yet to be parsed."""

import dataclasses

PREFIX = "lm_eval:"
"""Begins the name of a task of lm-eval among others: lm_eval:wikitext, lm_eval:my/task.yaml."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How tasks of lm-eval are asked."""

    limit: int | None = None
    """Documents of each task, its first ones; None: all."""
    num_fewshot: int | None = None
    """Examples before each question; None: as many as the task says."""
    lengths: tuple[int, ...] = ()
    """Tokens of the prompts that tasks generate themselves, such as RULER's; without it, the tasks' own."""
    stride: int | None = None
    """Targets that windows of a whole text score, its first excepted; None: the context length, as usual."""

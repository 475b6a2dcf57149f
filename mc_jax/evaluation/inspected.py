"""A text of the user's, read by a run's router: what was asked and what was found."""

import dataclasses
from typing import Any

from mc_jax.evaluation.needle import Span
from mc_jax.evaluation.origin import Origin, origin_of
from mc_jax.evaluation.router import Inspection, inspect_router
from mc_jax.evaluation.tasks.sample import sha256
from mc_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedText:
    """What a run's router reads of a text, with all that must be known to find it again."""

    origin: Origin
    """The weights, how they read, and the text."""
    name: str
    """What the text is called."""
    text: str
    """What was read."""
    needle: Span | None
    """The part of it that its end asks for."""
    inspection: Inspection
    """What was found."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, segments numbered from 0; gates are means over heads."""
        return {
            **self.origin.to_json(),
            "text": self.name,
            "needle_text": self.needle and self.text[self.needle.start : self.needle.stop],
            **self.inspection.to_json(),
        }


def inspect_text(
    run: Run, text: str, *, name: str, needle: str | None = None, asked_tokens: int = 1
) -> InspectedText:
    """Read a text as one document, and tell what each token reads and how a needle is found.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      text: what is read.
      name: what it is called.
      needle: a part of it that occurs once; None: nothing is looked for.
      asked_tokens: tokens at the text's end whose reading counts.

    Raises:
      ValueError: the needle does not occur once; or as `inspect_router`.
    """
    where = None if needle is None else _only_place(needle, text, name)
    return InspectedText(
        origin=origin_of(run, text=sha256(text)),
        name=name,
        text=text,
        needle=where,
        inspection=inspect_router(run, text, where, asked_tokens=asked_tokens),
    )


def _only_place(needle: str, text: str, name: str) -> Span:
    if not needle:
        raise ValueError("the needle is empty; give a part of the text")
    start = text.find(needle)
    if start < 0:
        raise ValueError(f"the needle {needle!r} does not occur in {name}; give a part of it to the letter")
    if text.find(needle, start + 1) >= 0:
        raise ValueError(
            f"the needle {needle!r} occurs in {name} more than once; give a longer part, which occurs once"
        )
    return Span(start, start + len(needle))

"""A text of the user's, read by a run's router: what was asked and what was found."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mc_jax.evaluation.dial import turned_settings
from mc_jax.evaluation.measurement import turned_json
from mc_jax.evaluation.needle import Span
from mc_jax.evaluation.result import checkpoint_hash
from mc_jax.evaluation.router import Inspection, inspect_router
from mc_jax.evaluation.tasks.sample import sha256
from mc_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectedText:
    """What a run's router reads of a text, with all that must be known to find it again."""

    run: str
    """The run's folder."""
    step: int
    """Finished steps of the checkpoint."""
    turned: Mapping[str, tuple[Any, Any]]
    """Settings that differ from training: what was trained, what was read with."""
    hashes: Mapping[str, str | None]
    """SHA-256 of tokenizer, text and checkpoint."""
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
            "run": self.run,
            "step": self.step,
            "turned": turned_json(self.turned),
            "hashes": dict(self.hashes),
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
        run=str(run.folder),
        step=run.step,
        turned=turned_settings(run),
        hashes={
            "tokenizer": run.dataset.tokenizer.fingerprint,
            "text": sha256(text),
            "checkpoint": checkpoint_hash(run),
        },
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

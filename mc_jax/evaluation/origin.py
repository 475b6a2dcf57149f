"""What a result of a run's model is of: the weights, and how they were read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mc_jax.evaluation.dial import turned_settings
from mc_jax.evaluation.result import checkpoint_hash
from mc_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The weights that a result is of, and how they were read: what must be known to find it again."""

    run: str
    """The run's folder."""
    step: int
    """Finished steps of the checkpoint."""
    turned: Mapping[str, tuple[Any, Any]]
    """Settings of the model and its window that differ from training: the trained value, and the read."""
    hashes: Mapping[str, str | None]
    """SHA-256 of tokenizer and checkpoint, and of the text, where there is one."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        turned = {
            name: {"trained": trained, "measured": measured}
            for name, (trained, measured) in self.turned.items()
        }
        return {"run": self.run, "step": self.step, "turned": turned, "hashes": dict(self.hashes)}


def origin_of(run: Run, **texts: str) -> Origin:
    """What results of a run are of.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      texts: hashes of what is read, by name.
    """
    return Origin(
        run=str(run.folder),
        step=run.step,
        turned=turned_settings(run),
        hashes={"tokenizer": run.dataset.tokenizer.fingerprint, **texts, "checkpoint": checkpoint_hash(run)},
    )

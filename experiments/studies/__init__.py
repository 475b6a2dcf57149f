"""Studies, which `python -m experiments.study` runs: modules with a function `study()`."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from mc_jax._arguments import UsageError
from mc_jax.evaluation.result import RESULT_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Variants of a recipe that are trained alike, and compared."""

    recipe: str
    """What `mc-jax train` is given first."""
    variants: Mapping[str, tuple[str, ...]]
    """Its options, by the variants' names; the first variant is what the others are compared with."""
    begins_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The variant whose weights another one takes, those of the same seed: --init is added for it."""
    common: tuple[str, ...] = ()
    """Options of all variants."""
    sweep: tuple[str, ...] = ()
    """Options of `mc-jax sweep`: how each run is read, besides as it was trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a study."""

    variant: str
    """The variant's name."""
    seed: int
    """What draws its weights and its rows."""
    folder: Path
    """The run's folder."""
    words: tuple[str, ...]
    """The command."""
    needs: Path | None = None
    """The run's folder whose weights it takes; None: it draws its own."""

    @property
    def is_possible(self) -> bool:
        """Whether the weights that it takes, if any, are those of a training that has ended."""
        return self.needs is None or (self.needs / RESULT_FILE).exists()

    @property
    def is_done(self) -> bool:
        """Whether the run was trained to its end and measured, by this command.

        Raises:
          UsageError: by another one.
        """
        file = self.folder / RESULT_FILE
        if not file.exists():
            return False
        found = json.loads(file.read_text())["command"]
        if shlex.split(found) != list(self.words):
            raise UsageError(
                f"{self.folder} was made by {found}, and not by {shlex.join(self.words)}; delete it, or name "
                "another --runs-dir"
            )
        return True

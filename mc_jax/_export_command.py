"""The command `mc-jax export`: a run's weights alone, for others to begin with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a run's weights into a folder of their own: no optimizer's state, adapters merged."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder that mc-jax train wrote, for example runs/quickstart."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """New folder, on a disk."""
    step: int | None = None
    """The checkpoint that is exported; None: the newest."""


def export(arguments: Sequence[str]) -> None:
    """Write a run's weights alone, for --init, eval and generate."""
    chosen = parse(ExportArguments, arguments, program="mc-jax export")

    must_be_run(chosen.run)
    if "://" in str(chosen.folder) or ":/" in str(chosen.folder):
        raise UsageError(f"{chosen.folder} is no folder on a disk; export to one, and copy it there")
    if chosen.folder.exists():
        raise UsageError(f"{chosen.folder} is there already; name another folder, or delete it")

    from etils import epath

    from mc_jax.training.export import export_run
    from mc_jax.training.run import load_run

    written = export_run(load_run(epath.Path(chosen.run), chosen.step), chosen.folder)
    print(
        f"{chosen.folder}: {written.parameters:,} weights of {chosen.run}, step {written.step:,}, "
        f"{written.bytes / 1e6:,.1f} MB; mc-jax train RECIPE --init {chosen.folder} begins with them"
    )

"""A sweep done: cells measured one after another, each kept in a file of its own, by one process or several.

A cell that has its file is done. So a sweep goes on where it was ended, and processes that work on one
folder divide its cells: a group that one compiled program serves is measured by the one that claims it.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mc_jax.data.files import make_folder, read_json, write_json
from mc_jax.data.store import TokenStore
from mc_jax.evaluation.devices import all_devices
from mc_jax.evaluation.sweep.cell import FIELDS, KIND, VERSION, measure_cell, name_of, router_of
from mc_jax.evaluation.sweep.claim import claimed
from mc_jax.evaluation.sweep.grid import Cell, Grid
from mc_jax.training.run import Run, load_run

CELLS_FOLDER = "cells"
_ERROR = ".error.json"
_SECONDS_BETWEEN_LOOKS = 0.5

type TextOf = Callable[[Run], TokenStore]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What the runs are read on."""

    step: int | None
    """Step of the checkpoints; None: the newest."""
    text_of: TextOf
    """The text for a run, by its tokenizer."""
    words: tuple[str, ...] = ()
    """Options of `mc-jax eval` that name it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A cell that was looked at."""

    cell: Cell
    """Which."""
    seconds: float | None
    """What it took; None: it was there."""
    error: str | None = None
    """Why it has no result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a sweep has found, in the order of its cells."""

    results: tuple[dict[str, Any], ...]
    """One result a cell, as `measure_cell` makes it."""
    failed: tuple[tuple[Cell, str], ...]
    """Cells without a result, each with its error."""


def run_sweep(
    grid: Grid,
    folder: Path,
    source: Source,
    *,
    overwrite: bool = False,
    told: Callable[[Done], None] = lambda done: None,
) -> Outcome:
    """Measure what is not measured yet, until all cells have a result or an error.

    Args:
      grid: the cells.
      folder: theirs; several processes may work on it.
      source: what is read.
      overwrite: whether all cells that are there when this begins are measured again, and not only those
        with an error.
      told: called with each cell that this process has looked at.

    Raises:
      ValueError: no run can be loaded, or read on this text; a file of a cell is damaged. Where some runs
        can, the cells of the others have an error.
    """
    cells_folder = folder / CELLS_FOLDER
    make_folder(cells_folder)
    files = _Files(cells_folder, overwrite)
    names: dict[int, str] = {}  # by the cell's place in the grid
    places = {id(cell): place for place, cell in enumerate(grid.cells)}
    lost: dict[int, Exception] = {}  # likewise
    pending = grid.groups()
    with _Loaded(source) as loaded:
        while pending:
            busy: list[tuple[Cell, ...]] = []
            for group in pending:
                try:
                    for cell in group:
                        if places[id(cell)] not in names:
                            names[places[id(cell)]] = name_of(cell, *loaded.get(cell))
                except (ValueError, OSError) as error:
                    for cell in group:
                        lost[places[id(cell)]] = error
                        told(Done(cell=cell, seconds=None, error=str(error)))
                    continue
                named = [(cell, names[places[id(cell)]]) for cell in group]
                with contextlib.ExitStack() as stack:
                    wanted = [name for _, name in named if not files.is_done(name)]
                    if wanted and not stack.enter_context(claimed(files.claim(named[0][1]))):
                        busy.append(group)
                        continue
                    _measure_group(named, loaded, files, told)
            if len(busy) == len(pending):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            pending = busy
    if not names:
        raise next(iter(lost.values()))
    found = files.outcome([(cell, names[place]) for place, cell in enumerate(grid.cells) if place in names])
    unread = tuple((grid.cells[place], str(error)) for place, error in lost.items())
    return dataclasses.replace(found, failed=(*found.failed, *unread))


def _measure_group(
    named: Sequence[tuple[Cell, str]], loaded: "_Loaded", files: "_Files", told: Callable[[Done], None]
) -> None:
    router: Any = None
    is_read = False
    for cell, name in named:
        if files.is_done(name):
            told(Done(cell=cell, seconds=None, error=files.error(name)))
            continue
        run, store = loaded.get(cell)
        started = time.monotonic()
        error = None
        try:
            if not is_read:
                router, is_read = router_of(cell, run, store), True
            values = measure_cell(cell, run, store, router, loaded.source.words)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            files.write_error(name, cell, error, cell.command(run.step, loaded.source.words))
        else:
            files.write(name, values)
        told(Done(cell=cell, seconds=time.monotonic() - started, error=error))


class _Loaded:
    """The run that was asked for last, with its text, on the devices that its cells are read on."""

    def __init__(self, source: Source):
        self.source = source
        self._stack = contextlib.ExitStack()
        self._key: tuple[str, bool] | None = None
        self._found: tuple[Run, TokenStore] | None = None
        self._failed: dict[tuple[str, bool], Exception] = {}

    def __enter__(self) -> "_Loaded":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def get(self, cell: Cell) -> tuple[Run, TokenStore]:
        key = cell.run, cell.mode == "stream"
        if key in self._failed:
            raise self._failed[key]
        if key != self._key or self._found is None:
            self._stack.close()
            self._found = None
            if cell.mode != "stream":  # whose caches lie on one device
                self._stack.enter_context(all_devices(cell.trained))
            try:
                run = load_run(cell.run, self.source.step)
                self._key, self._found = key, (run, self.source.text_of(run))
            except (ValueError, OSError) as error:
                self._failed[key] = error
                raise
        return self._found


class _Files:
    """The files of cells, and which of them count."""

    def __init__(self, folder: Path, overwrite: bool):
        self._folder = folder
        pattern = "*.json" if overwrite else f"*{_ERROR}"
        # What is written from here on, by whomever, counts.
        self._old = {path.name: _mark(path) for path in folder.glob(pattern)}

    def claim(self, name: str) -> Path:
        return self._folder / f"{name}.claim"

    def is_done(self, name: str) -> bool:
        return any(self._counts(self._folder / f"{name}{ending}") for ending in (".json", _ERROR))

    def error(self, name: str) -> str | None:
        if self._counts(self._folder / f"{name}.json"):
            return None
        return str(json.loads((self._folder / f"{name}{_ERROR}").read_text())["error"])

    def write(self, name: str, values: dict[str, Any]) -> None:
        write_json(self._folder / f"{name}.json", values)
        (self._folder / f"{name}{_ERROR}").unlink(missing_ok=True)

    def write_error(self, name: str, cell: Cell, error: str, command: str) -> None:
        values = {"run": cell.run, "settings": cell.settings(), "error": error, "command": command}
        write_json(self._folder / f"{name}{_ERROR}", values)

    def outcome(self, named: Sequence[tuple[Cell, str]]) -> Outcome:
        results, failed = [], []
        for cell, name in named:
            if (error := self.error(name)) is not None:
                failed.append((cell, error))
                continue
            path = self._folder / f"{name}.json"
            cure = "delete it, and start the sweep again"
            results.append(read_json(path, kind=KIND, version=VERSION, fields=FIELDS, cure=cure))
        return Outcome(results=tuple(results), failed=tuple(failed))

    def _counts(self, path: Path) -> bool:
        mark = _mark(path)
        return mark is not None and mark != self._old.get(path.name)


def _mark(path: Path) -> tuple[int, str] | None:
    """What a file that is written anew does not have again; None: there is none."""
    try:
        return path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None

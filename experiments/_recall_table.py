"""A table of recall in RESULTS.md: models of `experiments.mqar`, one a row, trained where it was stopped."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments._mqar_found import Found
from experiments.mqar import Cell, Result, run

_FOLDER = Path(__file__).parent
RESULTS = _FOLDER / "RESULTS.md"
"""Where all tables are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTable:
    """The models of a table, and how it is written."""

    name: str
    """Of the marks in RESULTS.md between which it stands."""
    rows: str
    """The file beside this module that has what was run."""
    cells: Mapping[str, Cell]
    """Models by the names of their rows, in their order."""
    columns: tuple[str, ...]
    """What is above the figures."""
    figures: Callable[[Result], tuple[str, ...]]
    """What is below the columns."""

    def make(self) -> None:
        """Run the rows that are missing, and write the table after each."""
        for name, cell in self.cells.items():
            if name in self.finished():
                continue
            result = run(cell)
            with (_FOLDER / self.rows).open("a") as file:
                file.write(json.dumps({"name": name, "result": dataclasses.asdict(result)}) + "\n")
            self._write()
            print(f"{name}: {result}", flush=True)
        self._write()

    def finished(self) -> dict[str, Result]:
        """The rows that were run, by name."""
        file, done = _FOLDER / self.rows, {}
        for line in file.read_text().splitlines() if file.exists() else ():
            if line.endswith("}"):  # and is whole
                row = json.loads(line)
                found = [Found(**one) for one in row["result"].pop("found", ())]
                done[row["name"]] = Result(**row["result"], found=found)
        return done

    def text(self) -> str:
        """The rows that were run in the order of the cells, as Markdown."""
        lines = [_line(self.columns), "|" + "---|" * len(self.columns)]
        done = self.finished()
        for name in self.cells:
            missing = ("not run", *[""] * (len(self.columns) - 2))
            lines.append(_line((name, *(self.figures(done[name]) if name in done else missing))))
        return "\n".join(lines)

    def _write(self) -> None:
        begin, end = f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"
        before, _, rest = RESULTS.read_text().partition(begin)
        _, _, after = rest.partition(end)
        assert rest, f"{begin} is not in {RESULTS.name}"
        RESULTS.write_text("\n".join([before + begin, self.text(), end + after]))


def mean(values: Sequence[float]) -> str:
    """Per cent, the mean over seeds."""
    return f"**{100 * sum(values) / len(values):.1f}**"


def each(values: Sequence[float]) -> str:
    """Per cent of each seed."""
    return " ".join(f"{100 * value:.0f}" for value in values)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"

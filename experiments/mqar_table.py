"""The table of recall: every memory and aggregation of `experiments.mqar`, beside attention.

    python -m experiments.mqar_table

It takes an hour on one core and goes on where it was stopped; RESULTS.md is written anew after every row.
"""

import dataclasses
import json
import sys
from pathlib import Path

from experiments.mqar import LENGTH, LONG, LONG_PAIRS, PAIRS, Cell, Result, run

_FOLDER = Path("runs/mqar")
_RESULTS = Path(__file__).parent / "RESULTS.md"
_MATRIX = ("none", "residual", "gated", "sparse", "average")
_BEGIN, _END = "<!-- mqar: begin -->", "<!-- mqar: end -->"


def cells() -> dict[str, Cell]:
    """The rows of the table, by name; what tells most comes first."""
    found = {
        "attention": Cell(memory="attention"),
        "linear, none": Cell(aggregation="none"),
        "linear, gated": Cell(),
        "linear, sparse": Cell(aggregation="sparse"),
        "linear, none, keys of 64": Cell(aggregation="none", key_dim=64),
        "linear, gated, checkpoint": Cell(segment_init="checkpoint"),
        "linear, residual": Cell(aggregation="residual"),
        "linear, average": Cell(aggregation="average"),
    }
    for aggregation in ("none", "gated"):
        for memory in ("delta", "swla", "titans"):
            found[f"{memory}, {aggregation}"] = Cell(memory=memory, aggregation=aggregation)
        for memory in ("titans", "dla"):
            found[f"{memory} (MLP), {aggregation}"] = Cell(memory=memory, aggregation=aggregation, mlp=True)
    for aggregation in ("sparse", "residual", "average"):
        for memory in ("delta", "swla", "titans"):
            found[f"{memory}, {aggregation}"] = Cell(memory=memory, aggregation=aggregation)
    for aggregation in ("soup", "sparse", "residual", "average"):
        for memory in ("titans", "dla"):
            found[f"{memory} (MLP), {aggregation}"] = Cell(memory=memory, aggregation=aggregation, mlp=True)
    return found


def main() -> int:
    """Run the rows that are missing, and write the table after each."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    log = _FOLDER / "table.jsonl"
    for name, cell in cells().items():
        done = _read(log)
        if name in done:
            continue
        result = run(cell)
        with log.open("a") as file:
            file.write(json.dumps({"name": name, "result": dataclasses.asdict(result)}) + "\n")
        _write(_read(log))
        print(f"{name}: {result}", flush=True)
    _write(_read(log))
    return 0


def _read(log: Path) -> dict[str, Result]:
    if not log.is_file():
        return {}
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return {row["name"]: Result(**row["result"]) for row in rows}


def _write(done: dict[str, Result]) -> None:
    """Put the table in its place between the marks."""
    lines = [
        f"| memory, aggregation | {LENGTH} tokens, {PAIRS[-1]} pairs | seeds "
        f"| {LONG} tokens, {LONG_PAIRS} pairs | seeds | state, bytes | cache, bytes | seconds a seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in cells():
        if name not in done:
            lines.append(f"| {name} | not run | | | | | | |")
            continue
        result = done[name]
        lines.append(
            f"| {name} | {_mean(result.accuracy)} | {_each(result.accuracy)} | {_mean(result.long_accuracy)} "
            f"| {_each(result.long_accuracy)} | {result.state_bytes:,} | {result.cache_bytes:,} "
            f"| {result.seconds / len(result.accuracy):.0f} |"
        )
    before, _, rest = _RESULTS.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _RESULTS.write_text("\n".join([before + _BEGIN, *lines, _END + after]))


def _mean(values: tuple[float, ...]) -> str:
    return f"**{100 * sum(values) / len(values):.1f}**"


def _each(values: tuple[float, ...]) -> str:
    return " ".join(f"{100 * value:.0f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())

"""The table of recall: every memory and aggregation of `experiments.mqar`, beside attention.

    python -m experiments.mqar_table

It takes two hours on one core and goes on where it was stopped: its rows are in `mqar_table.jsonl`, and
RESULTS.md is written anew after each.
"""

import dataclasses
import json
import sys
from pathlib import Path

from experiments.mqar import LENGTH, LONG, LONG_PAIRS, PAIRS, Cell, Result, run

_ROWS = Path(__file__).parent / "mqar_table.jsonl"
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
    for memory in ("delta", "swla", "titans"):
        found[f"{memory}, none, keys of 64"] = Cell(memory=memory, aggregation="none", key_dim=64)
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
    for name, cell in cells().items():
        if name in finished():
            continue
        result = run(cell)
        with _ROWS.open("a") as file:
            file.write(json.dumps({"name": name, "result": dataclasses.asdict(result)}) + "\n")
        _write()
        print(f"{name}: {result}", flush=True)
    _write()
    return 0


def finished() -> dict[str, Result]:
    """The rows that were run, by name."""
    rows = [json.loads(line) for line in _ROWS.read_text().splitlines() if line.endswith("}")]
    return {row["name"]: Result(**row["result"]) for row in rows}


def table(done: dict[str, Result]) -> str:
    """The rows in the order of `cells`, as Markdown."""
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
    return "\n".join(lines)


def _write() -> None:
    """Put the table in its place between the marks."""
    before, _, rest = _RESULTS.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _RESULTS.write_text("\n".join([before + _BEGIN, table(finished()), _END + after]))


def _mean(values: tuple[float, ...]) -> str:
    return f"**{100 * sum(values) / len(values):.1f}**"


def _each(values: tuple[float, ...]) -> str:
    return " ".join(f"{100 * value:.0f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())

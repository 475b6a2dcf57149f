"""The table of recall: every memory and aggregation of `experiments.mqar`, beside attention.

    python -m experiments.mqar_table

It takes two hours on one core and goes on where it was stopped: its rows are in `mqar_table.jsonl`, and
RESULTS.md is written anew after each.
"""

from experiments._recall_table import RecallTable, each, mean
from experiments.mqar import TASKS, Cell, Result

_TASK = TASKS["mqar"]
_MATRIX = ("none", "residual", "gated", "sparse", "average")


def _cells() -> dict[str, Cell]:
    """What tells most comes first."""
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


def _figures(result: Result) -> tuple[str, ...]:
    return (
        mean(result.accuracy),
        each(result.accuracy),
        mean(result.long_accuracy),
        each(result.long_accuracy),
        f"{result.state_bytes:,}",
        f"{result.cache_bytes:,}",
        f"{result.seconds / len(result.accuracy):.0f}",
    )


TABLE = RecallTable(
    name="mqar",
    rows="mqar_table.jsonl",
    cells=_cells(),
    columns=(
        "memory, aggregation",
        f"{_TASK.length} tokens, {_TASK.pairs[-1]} pairs",
        "seeds",
        f"{2 * _TASK.length} tokens, {_TASK.long_pairs} pairs",
        "seeds",
        "state, bytes",
        "cache, bytes",
        "seconds a seed",
    ),
    figures=_figures,
)


if __name__ == "__main__":
    TABLE.make()

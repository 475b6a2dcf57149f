"""The table of routers: which finds the segment that holds a pair, where a segment holds eight of them.

    python -m experiments.mqar_routers

It takes half an hour on one core and goes on where it was stopped: its rows are in `mqar_routers.jsonl`, and
RESULTS.md is written anew after each.
"""

import functools
import statistics

from experiments._mqar_found import Found, asked_of, chance
from experiments._recall_table import RecallTable, each, mean
from experiments.mqar import TASKS, Cell, Result, evaluation

_TASK = TASKS["multi-key"]
_CHANCE = 100 * chance(asked_of(evaluation("multi-key")[0], _TASK.segment), _TASK.segment)


def _cells() -> dict[str, Cell]:
    """What tells most comes first."""
    cell = functools.partial(Cell, task="multi-key", key_dim=32, seeds=1)
    return {
        "none": cell(aggregation="none"),
        "none, keys of 64": cell(aggregation="none", key_dim=64),
        "gated, keys of 8": cell(key_dim=8),
        "gated, keys of 16": cell(key_dim=16),
        "gated": cell(seeds=3),
        "gated, router_dim 4": cell(router_dim=4, seeds=3),
        "gated, router_blocks 8": cell(router_blocks=8, seeds=3),
        "sparse, top_k 2": cell(aggregation="sparse", seeds=3),
        "null": cell(aggregation="null"),
        "gated, router_dim 4, router_blocks 8": cell(router_dim=4, router_blocks=8),
        "gated, router_keys keys": cell(router_keys="keys"),
        "sparse, top_k 1": cell(aggregation="sparse", top_k=1),
        "none, keys of 256": cell(aggregation="none", key_dim=256),
        "gated, router_blocks 4": cell(router_blocks=4),
        "gated, router_blocks 2": cell(router_blocks=2),
        "sparse, top_k 4": cell(aggregation="sparse", top_k=4),
        "sparse, top_k 8": cell(aggregation="sparse", top_k=8),
        "sparse, top_k 1, at once": cell(aggregation="sparse", top_k=1, at_once=True),
        "average, top_k 8": cell(aggregation="average", top_k=8),
        "attention": cell(memory="attention"),
    }


def _figures(result: Result) -> tuple[str, ...]:
    found = result.found
    forced = [one.forced for one in found if one.forced is not None]
    return (
        mean(result.accuracy),
        each(result.accuracy),
        mean(result.long_accuracy),
        _over_layers(found, "largest"),
        _over_layers(found, "read"),
        mean(forced) if forced else "",
        f"{result.state_bytes + result.cache_bytes:,}",
    )


def _over_layers(found: list[Found], share: str) -> str:
    """Per cent, the mean over layers and heads and the best of them, means over seeds."""
    if not found:
        return ""
    of_seeds = [getattr(one, share) for one in found]
    over, best = (statistics.fmean(map(of, of_seeds)) for of in (statistics.fmean, max))
    return f"{100 * over:.0f}, {100 * best:.0f}"


TABLE = RecallTable(
    name="routers",
    rows="mqar_routers.jsonl",
    cells=_cells(),
    columns=(
        "linear, by aggregation and router",
        f"{_TASK.length} tokens, {_TASK.pairs[-1]} pairs",
        "seeds",
        f"{2 * _TASK.length} tokens, {_TASK.long_pairs} pairs",
        f"largest gate (chance {_CHANCE:.0f}): mean, best",
        "read: mean, best",
        "forced",
        "state and cache, bytes",
    ),
    figures=_figures,
)


if __name__ == "__main__":
    TABLE.make()

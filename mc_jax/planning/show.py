"""Plans as tables, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_jax.data.files import json_text
from mc_jax.planning.collectives import Collective
from mc_jax.planning.parts import UNKNOWN
from mc_jax.planning.plan import Plan
from mc_jax.planning.search import Attempt, Found
from mc_jax.planning.speed import Speed
from mc_jax.planning.verdict import Verdict

_GROUPS = 16
_COLLECTIVES = 12
_CAVEATS = (
    "Estimates of the compiler for one chip: no chip has run this. What streams from HBM is charged at "
    "some 40 % of the peak. Conditionals count with all branches but those said to run seldom; copies in the "
    "background count nothing. "
    "What is sent is under way from where the program begins it to where it waits for it, one after another."
)


def show(plan: Plan, verdict: Verdict, title: str) -> None:
    """Print one plan, its verdict first."""
    console = Console()
    for line in verdict.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(_head(plan), highlight=False)
    console.print(_parameters(plan), _memory(plan))
    console.print(_flops(plan))
    if plan.collectives:
        console.print(_sent(plan.collectives))
    if plan.speed is None:
        return
    console.print(_speed(plan, plan.speed), _groups(plan.speed), _dearest(plan.speed))
    lost = sum(group.cycles for group in plan.speed.groups if group.part == UNKNOWN)
    if lost:
        told = (
            f"{_share(lost, plan.speed):.1f} % of the time is of sources that mc_jax/planning/parts.py lacks"
        )
        console.print(told, style="bold")
    console.print(_CAVEATS, style="dim")


def compare(plans: Sequence[tuple[str, Plan, Verdict]]) -> None:
    """Print several plans side by side."""
    table = Table("", *[title for title, *_ in plans], title="plans; times, tokens/s and MFU are estimates")
    for name, tell in _ROWS:
        table.add_row(name, *[tell(plan) for _, plan, _ in plans])
    table.add_row("whole run, hours", *[_number(verdict.hours) for *_, verdict in plans])
    table.add_row("whole run, chip-hours", *[_number(verdict.chip_hours) for *_, verdict in plans])
    Console().print(table)


def show_attempt(attempt: Attempt) -> None:
    """Print one attempt of a search."""
    verdict = "fits" if attempt.fits else "does not fit"
    Console().print(
        f"remat {attempt.remat}, {attempt.rows} rows on a chip: {_gb(attempt.total)}, {verdict}",
        highlight=False,
    )


def show_found(found: Found) -> None:
    """Print how a search ends."""
    if found.config is None:
        line = "nothing fits: divide the model further (mesh.tensor), take more chips or a smaller model"
    else:
        training = found.config.training
        line = f"best: --training.batch-size {training.batch_size}, {found.rows} rows on a chip"
        line += f", --training.remat {training.remat}"
    Console().print(line, highlight=False)


def to_json(title: str, plan: Plan, verdict: Verdict) -> dict[str, Any]:
    """Return all figures, those that are sums among them; estimates are under "speed" and "verdict"."""
    found: dict[str, Any] = {"verdict": dataclasses.asdict(verdict)} | dataclasses.asdict(plan)
    found["title"] = title
    found["parameters_total"] = sum(plan.parameters.values())
    found["tokens"] = plan.flops.tokens
    found["flops"] |= {"token": plan.flops.token, "step": plan.flops.step}
    found["memory"] |= {"fits": plan.memory.fits, "free": plan.memory.free}
    return found | {"speed": found["speed"] and found["speed"] | {"is_estimate": True}}


def print_json(plans: Sequence[tuple[str, Plan, Verdict]]) -> None:
    """Print one object, or a list if there are several plans."""
    found = [to_json(title, plan, verdict) for title, plan, verdict in plans]
    print(json_text(found[0] if len(found) == 1 else found, indent=2))


def _head(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    return (
        f"{plan.chips} chips: {mesh}; {plan.rows} rows on each, remat {plan.remat}; "
        f"{plan.flops.tokens:,} tokens a step; "
        f"vocabulary {plan.vocabulary:,} ({plan.vocabulary_source})"
    )


def _parameters(plan: Plan) -> Table:
    table = Table("parameters", "number")
    for part, number in plan.parameters.items():
        table.add_row(part, f"{number:,}")
    table.add_section()
    total = sum(plan.parameters.values())
    table.add_row("total", f"{total:,}")
    if plan.trained < total:
        table.add_row("of them trained", f"{plan.trained:,}")
    return _right(table)


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(
        "memory of a chip" if memory.is_compiled else "memory of a chip, by formula (estimate)", "GB"
    )
    for part, size in memory.parts.items():
        table.add_row(part, f"{size / 1e9:,.3f}")
    table.add_section()
    table.add_row("total", f"{memory.total / 1e9:,.3f}")
    table.add_row("of", f"{memory.capacity / 1e9:,.3f}")
    table.add_row(_fits(plan), f"{memory.free / 1e9:,.3f}")
    if memory.host:
        table.add_row("beside it, in the host's memory", f"{memory.host / 1e9:,.3f}")
    return _right(table)


def _fits(plan: Plan) -> str:
    return "fits; left" if plan.memory.fits else f"DOES NOT FIT by {-plan.memory.free / 1e9:,.2f} GB"


def _flops(plan: Plan) -> Table:
    flops = plan.flops
    table = Table("FLOPs by formula, a token forward", "MFLOP")
    rows = {f"maps: {part}": value for part, value in flops.maps.items()}
    rows |= {
        "memories: writes and online reads": flops.memories,
        "cached reads and scores": flops.cached_reads,
    }
    rows |= {"attention": flops.attention}
    for name, value in rows.items():
        if value:
            table.add_row(name, f"{value / 1e6:,.2f}")
    table.add_section()
    if plan.trained < sum(plan.parameters.values()):
        table.caption = "x 3 is of all weights trained; gradients of those that are frozen are not made"
    table.add_row("forward and backward (x 3), a token", f"{flops.token / 1e6:,.2f}")
    table.add_row("a step, on a chip", f"{flops.step / plan.chips / 1e6:,.0f}")
    if plan.speed is not None:
        table.add_row("as compiled: its matrix products", f"{plan.speed.products / 1e6:,.0f}")
    return _right(table)


def _sent(sent: Sequence[Collective]) -> Table:
    table = Table("collectives", "axes", "chips", "MB each", "times", "overlaps", "ms (estimate)")
    for one in sent[:_COLLECTIVES]:
        table.add_row(
            f"{one.kind}, between slices" if one.network else one.kind,
            ", ".join(one.axes),
            str(one.chips),
            f"{one.bytes / 1e6:,.3f}",
            f"{one.times:,}",
            "yes" if one.overlaps else "no",
            f"{1e3 * one.times * one.seconds:,.3f}",
        )
    if rest := sent[_COLLECTIVES:]:
        table.add_row(
            f"{len(rest)} kinds more",
            "",
            "",
            "",
            "",
            "",
            f"{1e3 * sum(o.times * o.seconds for o in rest):,.3f}",
        )
    return _right(table)


def _speed(plan: Plan, speed: Speed) -> Table:
    table = Table("speed, all estimates", "")
    table.add_row("computing", f"{1e3 * speed.compute_seconds:,.2f} ms")
    table.add_row("  of it Pallas kernels", f"{_share(speed.kernel_cycles, speed):.1f} %")
    table.add_row("communication", f"{1e3 * speed.communication_seconds:,.2f} ms")
    table.add_row("  of it beside other work", f"{1e3 * speed.overlapping_seconds:,.2f} ms")
    table.add_section()
    table.add_row("step", _times(plan))
    table.add_row("  if all communication overlapped, or none", _range(plan))
    table.add_row("tokens/s", _tokens(plan))
    table.add_row("tokens/s of a chip", f"{speed.tokens_per_second / plan.chips:,.0f}")
    table.add_row("MFU", _mfu(plan))
    return _right(table)


def _groups(speed: Speed) -> Table:
    table = Table("what takes the time (estimates)", "", "forward, Mcycles", "backward, Mcycles", "%")
    for group in speed.groups[:_GROUPS]:
        table.add_row(
            group.part,
            group.work,
            f"{group.forward / 1e6:,.2f}",
            f"{group.backward / 1e6:,.2f}",
            f"{_share(group.cycles, speed):.1f}",
        )
    if rest := speed.groups[_GROUPS:]:
        table.add_row(f"{len(rest)} more", "", "", "", f"{_share(sum(g.cycles for g in rest), speed):.1f}")
    return _right(table, first=2)


def _dearest(speed: Speed) -> Table:
    table = Table("dearest operations (estimates)", "part", "work", "source", "times", "Mcycles", "%")
    for one in speed.dearest:
        table.add_row(
            one.name,
            one.part,
            one.work,
            "/".join(one.source.split("/")[-2:]),
            f"{one.times:,}",
            f"{one.cycles / 1e6:,.2f}",
            f"{_share(one.cycles, speed):.1f}",
        )
    return _right(table, first=4)


def _share(cycles: float, speed: Speed) -> float:
    return 100 * cycles / max(1.0, speed.xla_cycles + speed.kernel_cycles)


def _times(plan: Plan) -> str:
    return "-" if plan.speed is None else f"{1e3 * plan.speed.seconds:,.1f} ms"


def _range(plan: Plan) -> str:
    if plan.speed is None:
        return "-"
    return f"{1e3 * plan.speed.least_seconds:,.1f} to {1e3 * plan.speed.most_seconds:,.1f} ms"


def _tokens(plan: Plan) -> str:
    return "-" if plan.speed is None else f"{plan.speed.tokens_per_second:,.0f}"


def _mfu(plan: Plan) -> str:
    return "-" if plan.speed is None else f"{100 * plan.speed.mfu:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


_ROWS = (
    ("chips", lambda p: f"{p.chips} ({' x '.join(str(size) for size in p.mesh.values())})"),
    ("parameters", lambda p: f"{sum(p.parameters.values()) / 1e6:,.1f} M"),
    ("rows on a chip", lambda p: str(p.rows)),
    ("remat", lambda p: p.remat),
    ("tokens a step", lambda p: f"{p.flops.tokens:,}"),
    ("memory of a chip", lambda p: f"{_gb(p.memory.total)} of {_gb(p.memory.capacity)}"),
    ("", lambda p: "fits" if p.memory.fits else _fits(p)),
    ("MFLOP a token, by formula", lambda p: f"{p.flops.token / 1e6:,.1f}"),
    ("computing", lambda p: "-" if p.speed is None else f"{1e3 * p.speed.compute_seconds:,.1f} ms"),
    ("communication", lambda p: "-" if p.speed is None else f"{1e3 * p.speed.communication_seconds:,.1f} ms"),
    ("step", _times),
    ("  if all communication overlapped, or none", _range),
    ("tokens/s", _tokens),
    ("MFU", _mfu),
    ("dearest", lambda p: "-" if p.speed is None else f"{p.speed.groups[0].part}: {p.speed.groups[0].work}"),
)


def _right(table: Table, first: int = 1) -> Table:
    for column in table.columns[first:]:
        column.justify = "right"
    return table

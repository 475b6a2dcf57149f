"""What a plan comes to: whether the step fits, how fast it is, and what the recipe's whole run takes."""

import dataclasses
import math

from mc_jax.config import Config
from mc_jax.planning.chips import GPUS
from mc_jax.planning.plan import Plan
from mc_jax.slices import read_slice

_HEAVIER = {"none": "maps", "maps": "states", "states": "blocks", "blocks": "offload"}
_GIB = 2**30
_HOUR = 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answers that a plan is made for; times are estimates, and None where there are none."""

    fits: bool
    """Whether a chip's memory is enough."""
    free_gib: float
    """What is left of it; negative: what is missing."""
    chips: int
    """Chips that are rented: of a v4 or tpu7x, each is two devices."""
    step_seconds: float | None
    """Time of one step."""
    mfu: float | None
    """Share of the chips' peak that the FLOPs by formula make up."""
    tokens_per_second_per_chip: float | None
    """Throughput of one rented chip."""
    steps: int
    """Optimizer steps of the recipe's whole run."""
    tokens: int
    """Read in all of them."""
    hours: float | None
    """Time of all steps; evaluation, checkpoints and compiling are not counted."""
    chip_hours: float | None
    """The same, of all rented chips."""
    lines: tuple[str, str, str]
    """All of this in words."""


def verdict_of(plan: Plan, config: Config) -> Verdict:
    """Return the verdict on a run that has been planned."""
    chip, sides = read_slice(plan.topology)
    chips = math.prod(sides) * plan.slices
    speed = plan.speed
    hours = None if speed is None else config.training.steps * speed.seconds / _HOUR
    tokens = config.training.steps * plan.flops.tokens
    run = f"whole run: {config.training.steps:,} steps, {_short(tokens)} tokens"
    if speed is None:
        why = "nothing is compiled for GPUs" if chip in GPUS else "the step does not fit"
        second = f"step time, MFU and tokens/s: not known, for {why}"
        third = f"{run}; hours are not known"
        if chip in GPUS:
            least = plan.flops.step / (chips * GPUS[chip].flops)
            second += f"; at the peak of {chips} chips a step would take {least:,.3f} s"
            all_hours = config.training.steps * least / _HOUR
            third = (
                f"{run}; at that peak {all_hours:,.1f} hours, {chips * all_hours:,.0f} chip-hours: never less"
            )
    else:
        per_chip = speed.tokens_per_second / chips
        second = f"step {speed.seconds:,.3f} s, MFU {100 * speed.mfu:.1f} %, "
        second += f"{per_chip:,.0f} tokens/s per chip (estimates)"
        assert hours is not None
        third = f"{run} in {hours:,.1f} hours, {chips * hours:,.1f} chip-hours on {chips} chips (estimates)"
    return Verdict(
        fits=plan.memory.fits,
        free_gib=plan.memory.free / _GIB,
        chips=chips,
        step_seconds=None if speed is None else speed.seconds,
        mfu=None if speed is None else speed.mfu,
        tokens_per_second_per_chip=None if speed is None else speed.tokens_per_second / chips,
        steps=config.training.steps,
        tokens=tokens,
        hours=hours,
        chip_hours=None if hours is None else chips * hours,
        lines=(_fitting(plan, config), second, third),
    )


def _fitting(plan: Plan, config: Config) -> str:
    memory = plan.memory
    told = "" if memory.is_compiled else ", by formula"
    of = f"{memory.total / _GIB:,.2f} of {memory.capacity / _GIB:,.2f} GiB of a chip{told}"
    if memory.fits:
        return f"fits, {memory.free / _GIB:,.2f} GiB left: {of}"
    return f"DOES NOT FIT by {-memory.free / _GIB:,.2f} GiB: {of}; {_cure(plan, config)}"


def _cure(plan: Plan, config: Config) -> str:
    """What to change, by what takes the memory."""
    held = sum(plan.memory.parts.get(part, 0) for part in ("weights", "optimizer state"))
    if held > plan.memory.capacity:
        return "weights and optimizer state alone are too much: take more chips, or --mesh.tensor 2"
    settings = config.training
    ways = []
    if settings.remat in _HEAVIER:
        ways.append(f"--training.remat {_HEAVIER[settings.remat]}")
    if plan.rows % (2 * settings.accumulation) == 0:
        ways.append(f"--training.accumulation {2 * settings.accumulation}")
    ways.append("more chips")
    return f"--search finds what fits; or {' or '.join(ways)}"


def _short(number: int) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.1f} {name}"
    return f"{number:,}"

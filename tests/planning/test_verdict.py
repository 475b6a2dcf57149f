"""A plan comes to three lines: does it fit, how fast is it, what does the whole run take."""

import dataclasses

import pytest

from mc_jax.config import Config, TrainingConfig
from mc_jax.planning.formulas import Flops
from mc_jax.planning.memory import Memory
from mc_jax.planning.plan import Plan
from mc_jax.planning.speed import Speed
from mc_jax.planning.verdict import verdict_of

GIB = 2**30
SPEED = Speed(
    xla_cycles=1.0,
    kernel_cycles=0.0,
    compute_seconds=0.3,
    communication_seconds=0.0,
    overlapping_seconds=0.0,
    seconds=0.36,
    least_seconds=0.3,
    most_seconds=0.4,
    tokens_per_second=2e6,
    mfu=0.5,
    products=0.0,
    groups=(),
    dearest=(),
)


def planned(topology: str, *, total: float, speed: Speed | None, weights: float = 1.0, rows: int = 2) -> Plan:
    parts = {"weights": int(weights * GIB), "rest": int((total - weights) * GIB)}
    memory = Memory(parts=parts, total=int(total * GIB), capacity=16 * GIB, host=0, is_compiled=True)
    flops = Flops(tokens=524_288, maps={}, memories=0.0, cached_reads=0.0, attention=0.0)
    return Plan(
        topology=topology,
        slices=2,
        chips=32,
        mesh={},
        rows=rows,
        remat="maps",
        vocabulary=7,
        vocabulary_source="as told",
        parameters={},
        trained=0,
        flops=flops,
        memory=memory,
        collectives=(),
        speed=speed,
    )


RUN = Config(training=TrainingConfig(steps=10_000, remat="maps"))


def test_what_fits_is_told_with_its_speed_and_the_whole_run():
    assert verdict_of(planned("v5e:4x4", total=12.5, speed=SPEED), RUN).lines == (
        "fits, 3.50 GiB left: 12.50 of 16.00 GiB of a chip",
        "step 0.360 s, MFU 50.0 %, 62,500 tokens/s per chip (estimates)",
        "whole run: 10,000 steps, 5.2 B tokens in 1.0 hours, 32.0 chip-hours on 32 chips (estimates)",
    )


def test_a_chip_of_two_devices_is_rented_once():
    verdict = verdict_of(planned("tpu7x:2x2x2", total=1.0, speed=SPEED), RUN)
    assert (verdict.chips, verdict.chip_hours) == (16, 16.0)
    assert verdict.tokens_per_second_per_chip == 2e6 / 16


@pytest.mark.parametrize(
    ("remat", "accumulation", "weights", "told"),
    [
        (
            "maps",
            1,
            1.0,
            "--search finds what fits; or --training.remat states or --training.accumulation 2 or",
        ),
        ("offload", 1, 1.0, "--search finds what fits; or --training.accumulation 2 or more chips"),
        ("blocks", 2, 1.0, "--search finds what fits; or --training.remat offload or more chips"),
        (
            "maps",
            1,
            17.0,
            "weights and optimizer state alone are too much: take more chips, or --mesh.tensor 2",
        ),
    ],
)
def test_what_does_not_fit_names_the_cure(remat, accumulation, weights, told):
    training = dataclasses.replace(RUN.training, remat=remat, accumulation=accumulation)
    plan = planned("v5e:4x4", total=20.25, speed=None, weights=weights)
    verdict = verdict_of(plan, dataclasses.replace(RUN, training=training))
    first, second, third = verdict.lines
    assert first.startswith(f"DOES NOT FIT by 4.25 GiB: 20.25 of 16.00 GiB of a chip; {told}")
    assert second == "step time, MFU and tokens/s: not known, for the step does not fit"
    assert third == "whole run: 10,000 steps, 5.2 B tokens; hours are not known"
    assert (verdict.free_gib, verdict.hours, verdict.mfu) == (-4.25, None, None)

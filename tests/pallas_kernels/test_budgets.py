"""No change makes a kernel slower unseen: bundle counts, by the TPU's compiler, against those on record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _kernel_cases import CASES, TOKENS
from programs import fingerprint, source
from tpu_topology import four

from mc_jax.planning import cost, program, schedule, turns
from mc_jax.planning.cost import lower_anyhow
from mc_jax.planning.turns import kernel_works

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = json.loads((ROOT / "pallas_kernels/budgets.json").read_text())
SLACK = 1.05


def fingerprint_of(chip: str, op: str) -> str:
    case = CASES[op](TOKENS)
    function, shapes = case.whole("tpu")
    traced, lowered = lower_anyhow(chip, function, *shapes, donated=case.donated)
    # How often a kernel's loops turn is read off what was traced.
    works = list(kernel_works(traced.jaxpr.jaxpr))
    return fingerprint(lowered, repr(works), source(cost, program, schedule, turns))


def measured(chip: str, ops: list[str]):
    """Each op and its bundles, by a process of its own: libtpu writes schedules if told before it starts."""
    words = [sys.executable, str(ROOT / "scripts/_bench_kernels.py"), "--bundles", chip, "--ops", *ops]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            yield found["op"], found["bundles"]
    assert process.returncode == 0, "scripts/_bench_kernels.py failed"


@pytest.mark.parametrize("chip", BUDGETS)
def test_every_kernel_is_within_its_budget(programs, chip):
    four(chip)
    keys = {op: fingerprint_of(chip, op) for op in CASES}
    unknown = [op for op in CASES if not programs.knows(keys[op])]
    found = {}
    for op, bundles in measured(chip, unknown) if unknown else ():
        found |= programs.facts(f"{chip}, {op}", keys[op], lambda bundles=bundles: bundles)
    for op in CASES.keys() - {*unknown}:
        found |= programs.facts(f"{chip}, {op}", keys[op], dict)
    advice = "is it meant? then record it and say why: scripts/bench_kernels --record"
    budgets = BUDGETS[chip]
    assert found.keys() == budgets.keys(), f"kernels came or went; {advice}"
    for kernel, bundles in found.items():
        budget = budgets[kernel]
        assert bundles <= SLACK * budget, f"{kernel} on {chip}: {bundles} bundles, budget {budget}; {advice}"

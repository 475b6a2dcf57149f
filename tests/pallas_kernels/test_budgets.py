"""No change makes a kernel slower unseen: bundle counts, by the TPU's compiler, against those on record."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = json.loads((ROOT / "pallas_kernels/budgets.json").read_text())
SLACK = 1.05


def budgets_of(chip: str) -> dict[str, int]:
    """Of every second op, for each compiles for long: chips whose matrix units are as wide take turns."""
    narrow, wide = ["v5e", "v5p"], ["v6e", "tpu7x"]
    turn = max(names.index(chip) for names in (narrow, wide) if chip in names)
    ops = sorted({kernel.rpartition(": ")[0] for kernel in BUDGETS[chip]})[turn::2]
    return {kernel: found for kernel, found in BUDGETS[chip].items() if kernel.rpartition(": ")[0] in ops}


@pytest.mark.slow
@pytest.mark.parametrize("chip", BUDGETS)
def test_every_kernel_is_within_its_budget(chip):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed: uv sync --group aot")
    # A process of its own: libtpu is told once, before it starts, to write schedules.
    budgets = budgets_of(chip)
    ops = sorted({kernel.rpartition(": ")[0] for kernel in budgets})
    program = [sys.executable, str(ROOT / "scripts/_bench_kernels.py"), "--bundles", chip]
    run = subprocess.run([*program, "--ops", *ops], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    advice = "is it meant? then record it and say why: scripts/bench_kernels --record"
    assert found.keys() == budgets.keys(), f"kernels came or went; {advice}"
    for kernel, bundles in found.items():
        budget = budgets[kernel]
        assert bundles <= SLACK * budget, f"{kernel} on {chip}: {bundles} bundles, budget {budget}; {advice}"

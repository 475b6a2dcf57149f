"""What scripts/bench_kernels measures: every op, on record."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "scripts/_kernel_cases.py"


@pytest.fixture(scope="module")
def cases():
    spec = importlib.util.spec_from_file_location("kernel_cases", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_op_is_on_record_of_one_chip(cases):
    budgets = json.loads((FILE.parents[1] / "pallas_kernels/budgets.json").read_text())
    ops = {kernel.rpartition(": ")[0] for kernel in budgets["v5e"]}
    assert ops == set(cases.CASES), "record it: scripts/bench_kernels --record --chips v5e --ops NAME"

"""What scripts/bench_kernels measures: every op, on record, and the turns of the sparse read's loops."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.routed_read.tpu import plan_of

FILE = Path(__file__).resolve().parents[2] / "scripts/_kernel_cases.py"


@pytest.fixture(scope="module")
def cases():
    spec = importlib.util.spec_from_file_location("kernel_cases", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("tokens", "choices"), [(4096, 2), (65536, 2), (4096, 3)])
def test_every_pair_is_copied_once_each_way(cases, tokens, choices):
    q = jax.ShapeDtypeStruct((1, tokens, 1, 128), jnp.bfloat16)
    states = jax.ShapeDtypeStruct((1, tokens // 256, 1, 128, 128), jnp.bfloat16)
    plan = plan_of(q, choices, states)
    assert plan is not None
    for kernel in ("routed_read", "routed_read_backward"):
        groups, blocks, eights, ones, *again = cases.sparse_turns(q, states, 256, choices, kernel)
        assert again == [eights, ones]
        visited = plan.pieces * groups * plan.group
        assert visited * blocks * (8 * eights + ones) == pytest.approx(tokens * choices)


def test_of_other_kernels_nothing_is_said(cases):
    q = jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.bfloat16)
    states = jax.ShapeDtypeStruct((1, 16, 1, 128, 128), jnp.bfloat16)
    assert tuple(cases.sparse_turns(q, states, 256, 2, "linear_memory")) == ()


def test_every_op_is_on_record_of_one_chip(cases):
    budgets = json.loads((FILE.parents[1] / "pallas_kernels/budgets.json").read_text())
    ops = {kernel.rpartition(": ")[0] for kernel in budgets["v5e"]}
    assert ops == set(cases.CASES), "record it: scripts/bench_kernels --record --chips v5e --ops NAME"

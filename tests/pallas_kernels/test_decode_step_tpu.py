"""The TPU's decoding step in interpret mode against the reference, and compiled for absent chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_arguments import RULES, arguments, narrow, with_a_gate_of_zero
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS, lower_for

from pallas_kernels import decode_step
from pallas_kernels.decode_step import tpu

MODE = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


def _run(found, implementation):
    @jax.jit
    def run(arrays):
        return decode_step(**arrays, rule=found["rule"], implementation=implementation)

    return run({name: x for name, x in found.items() if name != "rule"})


def _assert_close(found, tolerance, dtype=jnp.float32, stored=jnp.float32):
    expected = _run(found, "reference")
    with pltpu.force_tpu_interpret_mode(MODE):
        got = jax.block_until_ready(_run(narrow(found, dtype, stored), "tpu"))
    assert got[0].dtype == dtype
    assert got[2].dtype == stored
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{b.shape} is off: {error}"
    return got


@pytest.mark.parametrize(
    ("rule", "key_dim", "value_dim"), [("linear", 96, 96), ("swla", 64, 20), ("delta", 256, 64)]
)
def test_a_token_is_that_of_the_reference(rule, key_dim, value_dim):
    _assert_close(arguments(rule, key_dim=key_dim, value_dim=value_dim), 1e-5)


def test_rows_and_blocks_of_heads_do_not_mix(monkeypatch):
    monkeypatch.setattr(tpu, "_HEADS", 2)
    _assert_close(arguments("titans", heads=6, choices=3), 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_is_accurate_to_rounding(rule):
    _assert_close(arguments(rule, key_dim=128, value_dim=128), 5e-3, jnp.bfloat16, jnp.bfloat16)


def test_what_lies_in_a_slot_is_nothing_to_a_gate_of_zero():
    found = with_a_gate_of_zero(arguments("linear"))
    expected = _assert_close(found, 1e-5)[0]
    with pltpu.force_tpu_interpret_mode(MODE):
        got = _run({**found, "states": found["states"].at[:, 3].set(jnp.nan)}, "tpu")[0]
    np.testing.assert_array_equal(got, expected)


def test_a_finished_state_takes_its_slot_alone_and_after_the_read():
    found = arguments("titans")
    found["indices"] = jnp.full_like(found["indices"], 1)  # the slot that row 1 appends to
    _, after, states = _assert_close(found, 1e-5)
    expected = np.array(found["states"])
    expected[1, 1], expected[2, 2] = after.weights[1], after.weights[2]
    np.testing.assert_array_equal(states, expected)


def _lowered(chip, rule, heads, dim, stored, implementation="tpu"):
    def made():
        found = arguments(rule, batch=2, slots=8, heads=heads, key_dim=dim, value_dim=dim)
        found.pop("rule")
        return narrow(found, jnp.bfloat16, stored)

    found = jax.eval_shape(made)
    kept = {name: found.pop(name) for name in ("state", "states")}

    def run(kept, found):
        return decode_step(**kept, **found, rule=rule, implementation=implementation)

    return lower_for(chip, run, kept, found, donate_argnums=0), kept


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("heads", "dim"), [(16, 96), (16, 128), (8, 256)])
def test_it_compiles_and_copies_no_state(programs, chip, heads, dim):
    lowered, kept = _lowered(chip, "titans", heads, dim, jnp.bfloat16)
    found = programs.compiled(lowered)
    assert found["kernels"] == {"decode_step": 1}
    used = found["bytes"]
    assert used["alias"] >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert used["temp"] < 2 * heads * dim * dim, "one state of all heads would be more"


@pytest.mark.parametrize("rule", ["linear", "swla", "delta"])
def test_other_rules_compile_with_float32_states_where_memory_is_least(programs, rule):
    lowered, _ = _lowered("v4", rule, 4, 256, jnp.float32)
    assert programs.compiled(lowered)["kernels"] == {"decode_step": 1}


def test_the_default_is_the_kernel_on_a_tpu_and_not_elsewhere(programs):
    lowered, kept = _lowered("v5e", "linear", 2, 64, jnp.float32, None)
    assert "tpu_custom_call" in lowered.as_text()
    assert programs.compiled(lowered)["bytes"]["temp"] < kept["states"].size
    found = arguments("linear")
    run = functools.partial(decode_step, rule=found.pop("rule"))
    assert "tpu_custom_call" not in jax.jit(lambda found: run(**found)).lower(found).as_text()

"""A token of decoding with a cache: the fast form against the plain one, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_arguments import RULES, arguments, narrow, with_a_gate_of_zero

from pallas_kernels import decode_step, memory_step


def _run(found, implementation):
    return jax.jit(lambda arrays: decode_step(**arrays, rule=found["rule"], implementation=implementation))(
        {name: x for name, x in found.items() if name != "rule"}
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", RULES)
def test_a_token_is_that_of_the_reference(rule):
    found = arguments(rule, dtype=jnp.float64)
    for got, expected in zip(
        jax.tree.leaves(_run(found, None)), jax.tree.leaves(_run(found, "reference")), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_nothing_selected_leaves_a_step_of_the_memory():
    found = arguments("linear")
    y, after, _ = _run({**found, "gates": jnp.zeros_like(found["gates"])}, "xla")
    write = {name: found[name] for name in ("q", "k", "v", "rule", "retention", "step")}
    read, expected = memory_step(found["state"], **write)
    np.testing.assert_allclose(y, found["online_gate"][..., None] * read, rtol=1e-6)
    np.testing.assert_array_equal(after.weights, expected.weights)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_lies_in_a_slot_is_nothing_to_a_gate_of_zero(implementation):
    found = with_a_gate_of_zero(arguments("linear"))
    expected = _run(found, implementation)[0]
    poisoned = {**found, "states": found["states"].at[:, 3].set(jnp.nan)}
    np.testing.assert_array_equal(_run(poisoned, implementation)[0], expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_finished_state_takes_its_slot_alone_and_after_the_read(implementation):
    found = arguments("delta")
    found["indices"] = jnp.full_like(found["indices"], 1)  # the slot that row 1 appends to
    y, after, states = _run(found, implementation)
    untouched, _, _ = _run({**found, "slot": jnp.full_like(found["slot"], -1)}, implementation)
    np.testing.assert_array_equal(y, untouched)
    expected = np.array(found["states"])
    expected[1, 1], expected[2, 2] = after.weights[1], after.weights[2]
    np.testing.assert_array_equal(states, expected)


def test_bfloat16_keeps_its_dtype_and_its_accuracy():
    found = arguments("titans", key_dim=64, value_dim=64)
    y, after, states = _run(narrow(found, jnp.bfloat16, jnp.bfloat16), "xla")
    assert y.dtype == states.dtype == jnp.bfloat16
    assert after.weights.dtype == jnp.float32
    expected, *_ = _run(found, "reference")
    error = np.linalg.norm(np.asarray(y - expected.astype(y.dtype), np.float64))
    assert error < 8e-3 * np.linalg.norm(np.asarray(expected, np.float64))


def test_arguments_that_do_not_fit_are_refused():
    found = arguments("titans")
    for change, word in (
        ({"v": found["v"][..., :1]}, "the online state does not fit"),
        ({"states": found["states"][:, :0]}, "1 slot or more"),
        ({"gates": found["gates"][..., :1]}, "gates"),
        ({"indices": found["gates"]}, "indices are float32; give integers"),
        ({"slot": found["slot"][:1]}, "slot"),
        ({"chunk_start": None}, "give chunk_start"),
        ({"implementation": "fast"}, "unknown implementation 'fast'; choose from reference, tpu, xla"),
    ):
        with pytest.raises(ValueError, match=word):
            decode_step(**{**found, **change})

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_description import lower_for_gpu, on_gpu

from pallas_kernels.routed_read import routed_state_read, xla

BATCH, LENGTH, HEADS, KEY_DIM, VALUE_DIM, HIDDEN, STATES, CHOICES = 2, 37, 2, 4, 6, 7, 5, 2
IMPLEMENTATIONS = ("blocks", "ragged_dot", "gather")


def _arguments(seed, dtype=jnp.float32, *, length=LENGTH, states=STATES, choices=CHOICES, mlp=False):
    keys = jax.random.split(jax.random.key(seed), 5)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def weights(key, rows, columns):
        return jax.random.normal(key, (BATCH, states, HEADS, rows, columns), wide)

    if mlp:
        cached = weights(keys[2], KEY_DIM, HIDDEN), weights(keys[3], HIDDEN, VALUE_DIM)
    else:
        cached = weights(keys[2], KEY_DIM, VALUE_DIM)
    _, indices = jax.lax.top_k(jax.random.normal(keys[4], (BATCH, length, HEADS, states)), choices)
    return (
        jax.random.normal(keys[0], (BATCH, length, HEADS, KEY_DIM), dtype),
        jax.random.normal(keys[1], (BATCH, length, HEADS, choices), wide),
        indices,
        cached,
    )


def _read_and_gradients(arguments, implementation, branch=None):
    """The result and the gradients of a weighted sum of it, by name."""
    q, gates, indices, states = arguments
    weights = jnp.sin(jnp.arange(BATCH * q.shape[1] * HEADS * VALUE_DIM, dtype=gates.dtype))

    @jax.jit
    def run(q, gates, indices, states):
        def loss(q, gates, states):
            out = routed_state_read(q, gates, indices, states, branch=branch, implementation=implementation)
            return jnp.sum(out.astype(gates.dtype).reshape(-1) * weights), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, gates, states)
        return out, gradients

    out, (q_bar, gates_bar, states_bar) = run(q, gates, indices, states)
    return {"the result": out, "q": q_bar, "gates": gates_bar, "states": states_bar}


def _relative_error(got, expected):
    got, expected = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    )
    return np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30)


def _assert_agree(got, expected, value_tolerance, gradient_tolerance):
    for name, theirs in expected.items():
        tolerance = value_tolerance if name == "the result" else gradient_tolerance
        error = _relative_error(got[name], theirs)
        assert error < tolerance, (
            f"{name if name == 'the result' else 'the gradient of ' + name} is off: {error}"
        )


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
@pytest.mark.parametrize("length", [LENGTH, 1])
def test_a_state_that_is_not_finite_is_nothing_to_a_gate_of_zero_and_nan_to_any_other(mlp, length):
    q, gates, indices, states = _arguments(6, mlp=mlp, length=length)
    chosen = indices == 1
    reads = jnp.any(chosen, axis=-1).at[1].set(False)
    gates = jnp.where(chosen & ~reads[..., None], 0, gates)
    poisoned = jax.tree.map(lambda leaf: leaf.at[:, 1].set(jnp.nan).at[:, 1, :, 0, 0].set(jnp.inf), states)
    got = _read_and_gradients((q, gates, indices, poisoned), "xla")
    expected = _read_and_gradients((q, jnp.where(reads[..., None], 0, gates), indices, states), "reference")
    np.testing.assert_array_equal(np.isnan(got["the result"]).all(-1), reads)
    np.testing.assert_allclose(got["the result"][~reads], expected["the result"][~reads], atol=1e-5)
    if length > 1:  # a token alone, in decoding, has no gradient
        np.testing.assert_allclose(got["q"], expected["q"], atol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((got["gates"], got["states"])))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("branch", [None, "bounded", "plain"], ids=["matrix", "bounded", "plain"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_read_and_its_gradients_are_those_of_the_reference(implementation, branch):
    arguments = _arguments(0, jnp.float64, mlp=branch is not None)
    expected = _read_and_gradients(arguments, "reference", branch)
    _assert_agree(_read_and_gradients(arguments, implementation, branch), expected, 1e-9, 1e-7)


def _one_state(indices):
    return jnp.full_like(indices, 3)


def _the_same_twice(indices):
    return jnp.broadcast_to(indices[..., :1], indices.shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
@pytest.mark.parametrize("choose", [_one_state, _the_same_twice], ids=["all tokens", "both choices"])
def test_one_state_may_be_chosen_by_all(implementation, choose):
    q, gates, indices, states = _arguments(1, jnp.float64)
    arguments = q, gates, choose(indices), states
    expected = _read_and_gradients(arguments, "reference")
    _assert_agree(_read_and_gradients(arguments, implementation), expected, 1e-9, 1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
@pytest.mark.parametrize(("length", "states", "choices"), [(3, 1, 1), (9, 4, 4), (2, 40, 2), (70, 2, 1)])
def test_any_number_of_states_and_choices_will_do(implementation, length, states, choices):
    arguments = _arguments(2, jnp.float64, length=length, states=states, choices=choices)
    expected = _read_and_gradients(arguments, "reference")
    _assert_agree(_read_and_gradients(arguments, implementation), expected, 1e-9, 1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("at_once", [1, 2, BATCH * HEADS])
def test_heads_side_by_side_on_a_gpu_read_as_the_reference_does(at_once, monkeypatch):
    arguments = _arguments(4, jnp.float64)
    rows = LENGTH * CHOICES + STATES * xla._BLOCK
    monkeypatch.setattr(xla, "_GPU_COPIES", at_once * (rows // xla._BLOCK) * KEY_DIM * VALUE_DIM * 8)
    expected = _read_and_gradients(arguments, "reference")
    with on_gpu():
        assert xla._heads_at_once(*jax.tree.map(xla._heads_first, arguments)) == at_once
        _assert_agree(_read_and_gradients(arguments, None), expected, 1e-9, 1e-7)


def test_no_read_on_a_gpu_multiplies_all_rows_with_all_states():
    # XLA expands a ragged product on GPUs: rows x states, which no memory holds.
    def lowered(implementation):
        return lower_for_gpu(lambda *x: _read_and_gradients(x, implementation), *_arguments(5))

    assert "ragged_dot" in lowered("ragged_dot"), "XLA's name for it has changed: look for the new one"
    assert "ragged_dot" not in lowered(None)


def test_reading_all_states_is_the_dense_read():
    q, gates, indices, states = _arguments(3, choices=STATES)
    dense = jnp.take_along_axis(gates, jnp.argsort(indices), axis=-1)
    expected = jnp.einsum("bthk,bthn,bnhkv->bthv", q, dense, states)
    assert _relative_error(routed_state_read(q, gates, indices, states), expected) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gate_of_zero_contributes_nothing(implementation):
    q, gates, indices, states = _arguments(4)
    gates = gates.at[..., 1].set(0)
    first = _read_and_gradients((q, gates[..., :1], indices[..., :1], states), implementation)
    both = _read_and_gradients((q, gates, indices, states), implementation)
    for name in ("the result", "q", "states"):
        assert _relative_error(both[name], first[name]) < 1e-6, f"choices with gate 0 show in {name}"


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_what_is_picked_by_itself_is_exact_to_rounding(length, mlp):
    arguments = _arguments(5, length=length, mlp=mlp)
    _assert_agree(
        _read_and_gradients(arguments, None), _read_and_gradients(arguments, "reference"), 1e-5, 1e-5
    )


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_queries_keep_their_dtype_and_their_accuracy(implementation, mlp):
    q, gates, indices, states = _arguments(6, jnp.bfloat16, mlp=mlp)
    got = _read_and_gradients((q, gates, indices, states), implementation)
    assert got["the result"].dtype == got["q"].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got["states"]))
    expected = _read_and_gradients((q.astype(jnp.float32), gates, indices, states), "reference")
    _assert_agree(got, expected, 8e-3, 8e-3)


def test_cost_does_not_grow_with_the_number_of_states():
    def flops(states):
        arguments = (
            jax.ShapeDtypeStruct((1, 1024, 1, 32), jnp.float32),
            jax.ShapeDtypeStruct((1, 1024, 1, 2), jnp.float32),
            jax.ShapeDtypeStruct((1, 1024, 1, 2), jnp.int32),
            jax.ShapeDtypeStruct((1, states, 1, 32, 32), jnp.float32),
        )
        return jax.jit(routed_state_read).lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(32) < 2 * flops(4), "8 times the states must not cost 8 times as much: only k are read"


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="branch 'plain' has no effect on states that are matrices"):
        _read_and_gradients(_arguments(7), "gather", "plain")
    q, gates, indices, states = _arguments(7)
    w_in, w_out = _arguments(7, mlp=True)[3]
    for wrong, word in (
        ((q, gates[..., :1], indices, states), "gates"),
        ((q, gates[:, :3], indices[:, :3], states), "gates"),
        ((q, gates, gates, states), "integers"),
        ((q, gates, indices, states[:, :0]), "1 state or more"),
        ((q, gates, indices, states[..., 1:, :]), "states"),
        ((q, gates, indices, (w_in, w_out[..., 1:, :])), "w_out"),
    ):
        with pytest.raises(ValueError, match=word):
            routed_state_read(*wrong)
    with pytest.raises(ValueError, match="unknown implementation"):
        routed_state_read(q, gates, indices, states, implementation="fast")

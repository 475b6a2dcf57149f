import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_state_read

BATCH, LENGTH, HEADS, KEY_DIM, VALUE_DIM, HIDDEN = 2, 21, 2, 4, 6, 7


def _arguments(seed, dtype=jnp.float32, *, states=3, mlp=False, length=LENGTH):
    keys = jax.random.split(jax.random.key(seed), 4)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def weights(key, rows, columns):
        return jax.random.normal(key, (BATCH, states, HEADS, rows, columns), wide)

    if mlp:
        cached = weights(keys[2], KEY_DIM, HIDDEN), weights(keys[3], HIDDEN, VALUE_DIM)
    else:
        cached = weights(keys[2], KEY_DIM, VALUE_DIM)
    return (
        jax.random.normal(keys[0], (BATCH, length, HEADS, KEY_DIM), dtype),
        jax.nn.softmax(jax.random.normal(keys[1], (BATCH, length, HEADS, states), wide)),
        cached,
    )


def _causal(gates, segment_length):
    _, length, _, states = gates.shape
    before = jnp.arange(states)[None] < jnp.arange(length)[:, None] // segment_length
    return jnp.where(before[None, :, None], gates, jnp.zeros((), gates.dtype))


def _read_and_gradients(arguments, implementation, segment_length=None, branch=None):
    """The result and the gradients of a weighted sum of it, by name."""
    q, gates, states = arguments
    weights = jnp.sin(jnp.arange(BATCH * q.shape[1] * HEADS * VALUE_DIM, dtype=gates.dtype))

    @jax.jit
    def run(q, gates, states):
        def loss(q, gates, states):
            if segment_length is not None:
                gates = _causal(gates, segment_length)
            out = gated_state_read(
                q,
                gates,
                states,
                branch=branch,
                segment_length=segment_length,
                implementation=implementation,
            )
            return jnp.sum(out.astype(gates.dtype).reshape(-1) * weights), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, gates, states)
        return out, gradients

    out, (q_bar, gates_bar, states_bar) = run(q, gates, states)
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("branch", "states"),
    [(None, 1), (None, 6), ("bounded", 1), ("bounded", 6), ("plain", 6)],
    ids=lambda value: "matrix" if value is None else str(value),
)
def test_xla_read_and_its_gradients_are_those_of_the_reference(branch, states):
    arguments = _arguments(0, jnp.float64, states=states, mlp=branch is not None)
    expected = _read_and_gradients(arguments, "reference", branch=branch)
    _assert_agree(_read_and_gradients(arguments, "xla", branch=branch), expected, 1e-9, 1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
@pytest.mark.parametrize(("segment_length", "states"), [(1, 21), (2, 9), (4, 6), (30, 3)])
def test_a_promised_segment_length_changes_nothing(mlp, segment_length, states):
    arguments = _arguments(1, jnp.float64, states=states, mlp=mlp)
    expected = _read_and_gradients(arguments, "reference", segment_length)
    _assert_agree(_read_and_gradients(arguments, "xla", segment_length), expected, 1e-9, 1e-7)


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
@pytest.mark.parametrize("length", [LENGTH, 1])
def test_a_state_that_is_not_finite_is_nothing_to_a_gate_of_zero_and_nan_to_any_other(mlp, length):
    q, gates, states = _arguments(6, mlp=mlp, length=length)
    reads = jnp.zeros((BATCH, length, HEADS), bool).at[0, 0::3, 1].set(True)
    gates = gates.at[..., 1].set(jnp.where(reads, gates[..., 1], 0))
    poisoned = jax.tree.map(lambda leaf: leaf.at[:, 1].set(jnp.nan).at[:, 1, :, 0, 0].set(jnp.inf), states)
    got = _read_and_gradients((q, gates, poisoned), "xla")
    # What reads nothing at all stands for what is NaN: neither has a gradient.
    expected = _read_and_gradients((q, jnp.where(reads[..., None], 0, gates), states), "reference")
    np.testing.assert_array_equal(
        np.isnan(got["the result"]), np.broadcast_to(reads[..., None], got["the result"].shape)
    )
    np.testing.assert_allclose(got["the result"][~reads], expected["the result"][~reads], atol=1e-5)
    if length > 1:  # a token alone, in decoding, has no gradient
        np.testing.assert_allclose(got["q"], expected["q"], atol=1e-5)
        others = np.array([0, 2])
        np.testing.assert_allclose(
            got["gates"][~reads][:, others], expected["gates"][~reads][:, others], atol=1e-5
        )
        assert not np.any(got["gates"][~reads][:, 1])
        for leaf, right in zip(
            jax.tree.leaves(got["states"]), jax.tree.leaves(expected["states"]), strict=True
        ):
            np.testing.assert_allclose(leaf, right, atol=1e-5)


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_float32_is_exact_to_rounding(mlp):
    arguments = _arguments(2, mlp=mlp)
    _assert_agree(
        _read_and_gradients(arguments, "xla"), _read_and_gradients(arguments, "reference"), 1e-5, 1e-5
    )


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_bfloat16_queries_keep_their_dtype_and_their_accuracy(mlp):
    q, gates, states = _arguments(3, jnp.bfloat16, mlp=mlp)
    got = _read_and_gradients((q, gates, states), "xla")
    assert got["the result"].dtype == got["q"].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got["states"]))
    expected = _read_and_gradients((q.astype(jnp.float32), gates, states), "reference")
    _assert_agree(got, expected, 8e-3, 8e-3)


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_one_token_is_read_like_many(mlp):
    arguments = _arguments(4, mlp=mlp, length=1)
    _assert_agree(
        _read_and_gradients(arguments, "xla"), _read_and_gradients(arguments, "reference"), 1e-5, 1e-5
    )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_no_states_read_as_zero(mlp, implementation):
    q, gates, states = _arguments(5, states=0, mlp=mlp)
    out = gated_state_read(q, gates, states, implementation=implementation)
    assert out.shape == (BATCH, LENGTH, HEADS, VALUE_DIM)
    assert not out.any()


@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_nothing_of_the_size_of_tokens_times_states_times_dim_is_kept(mlp):
    length, states, dim, hidden = 256, 32, 16, 32

    def weights(rows, columns):
        return jax.ShapeDtypeStruct((1, states, 1, rows, columns), jnp.float32)

    cached = (weights(dim, hidden), weights(hidden, dim)) if mlp else weights(dim, dim)
    tokens = jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32)
    gates = jax.ShapeDtypeStruct((1, length, 1, states), jnp.float32)
    gradient = jax.grad(lambda *x: jnp.sum(gated_state_read(*x) ** 2), argnums=(0, 1, 2))
    kept = jax.jit(gradient).lower(tokens, gates, cached).compile().memory_analysis().temp_size_in_bytes
    assert kept < 4 * length * states * (hidden if mlp else dim), "do not expand tokens over states"


def test_shapes_that_do_not_fit_are_refused():
    q, gates, states = _arguments(6)
    with pytest.raises(ValueError, match="branch 'plain' has no effect on states that are matrices"):
        gated_state_read(q, gates, states, branch="plain")
    with pytest.raises(ValueError, match="gates"):
        gated_state_read(q, gates[:, :4], states)
    with pytest.raises(ValueError, match="states"):
        gated_state_read(q, gates, states[:, :2])
    w_in, w_out = _arguments(6, mlp=True)[2]
    with pytest.raises(ValueError, match="hidden"):
        gated_state_read(q, gates, (w_in, w_out[:, :, :, 1:]))
    with pytest.raises(ValueError, match="segment_length"):
        gated_state_read(q, gates, states, segment_length=0)
    with pytest.raises(ValueError, match="unknown implementation"):
        gated_state_read(q, gates, states, implementation="fast")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_state_read


def _arguments(seed, dtype, batch=2, length=5, heads=3, key_dim=4, value_dim=6, states=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, length, heads, key_dim), dtype),
        jax.nn.softmax(jax.random.normal(keys[1], (batch, length, heads, states), jnp.float32)),
        jax.random.normal(keys[2], (batch, states, heads, key_dim, value_dim), jnp.float32),
    )


def _relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30)


@pytest.mark.parametrize("states", [1, 3])
def test_xla_read_and_its_gradients_agree_with_the_reference(states):
    arguments = _arguments(0, jnp.float32, states=states)

    def loss(implementation):
        def of(*arguments):
            out = gated_state_read(*arguments, implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)(*arguments)

    (_, expected), expected_gradients = loss("reference")
    (_, got), gradients = loss("xla")
    assert _relative_error(got, expected) < 1e-5
    for name, ours, theirs in zip(("q", "gates", "states"), gradients, expected_gradients, strict=True):
        assert _relative_error(ours, theirs) < 1e-5, f"the gradient of {name} is off"


def test_no_states_read_as_zero():
    q, gates, states = _arguments(1, jnp.float32)
    out = gated_state_read(q, gates[..., :0], states[:, :0])
    assert out.shape == (2, 5, 3, 6)
    assert not out.any()


def test_bfloat16_queries_keep_their_dtype_and_their_accuracy():
    q, gates, states = _arguments(2, jnp.bfloat16)
    out = gated_state_read(q, gates, states)
    assert out.dtype == jnp.bfloat16
    assert _relative_error(out, gated_state_read(q.astype(jnp.float32), gates, states)) < 8e-3


def test_shapes_that_do_not_fit_are_refused():
    q, gates, states = _arguments(3, jnp.float32)
    with pytest.raises(ValueError, match="gates"):
        gated_state_read(q, gates[:, :4], states)
    with pytest.raises(ValueError, match="states"):
        gated_state_read(q, gates, states[:, :2])
    with pytest.raises(ValueError, match="unknown implementation"):
        gated_state_read(q, gates, states, implementation="fast")

"""Hopper's read of matrices: interpreted, against the reference, and lowered for GPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_description import AMPERE, lower_for_gpu, on_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gated_state_read
from pallas_kernels.state_read import xla

# RMS ratios: what rounding to bfloat16 of states, of gates times queries and of results costs.
TOLERANCES = {"the result": 5e-3, "q": 8e-3, "gates": 2e-2, "states": 8e-3}


def _arguments(length, states, key_dim, value_dim, segment_length=None, batch=1, heads=1):
    keys = jax.random.split(jax.random.key(length), 4)
    q = jax.random.normal(keys[0], (batch, length, heads, key_dim), jnp.bfloat16)
    gates = jax.nn.softmax(jax.random.normal(keys[1], (batch, length, heads, states)))
    if segment_length is not None:
        gates = jnp.where(_readable(gates, segment_length), gates, jnp.zeros_like(gates))
    matrices = jax.random.normal(keys[2], (batch, states, heads, key_dim, value_dim)) / key_dim**0.5
    return q, gates, matrices, jax.random.normal(keys[3], (batch, length, heads, value_dim), jnp.bfloat16)


def _readable(gates, segment_length):
    _, length, _, states = gates.shape
    return (jnp.arange(states)[None] < jnp.arange(length)[:, None] // segment_length)[None, :, None]


def _read(implementation, segment_length=None):
    return functools.partial(gated_state_read, segment_length=segment_length, implementation=implementation)


def _read_and_gradients(implementation, segment_length=None):
    def run(q, gates, states, out_bar):
        out, vjp = jax.vjp(_read(implementation, segment_length), q, gates, states)
        return dict(zip(TOLERANCES, (out, *vjp(out_bar.astype(out.dtype))), strict=True))

    return run


def _interpreted(function, *arguments):
    with on_gpu(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return jax.block_until_ready(jax.jit(function)(*arguments))


def _assert_close(name, got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    error = np.linalg.norm(got - expected) / (np.linalg.norm(expected) + 1e-30)
    assert error < TOLERANCES[name], f"{name} (or the gradient of it) is off: {error}"


@pytest.mark.parametrize(
    ("length", "states", "key_dim", "value_dim", "segment_length"),
    [(1, 1, 64, 64, None), (140, 2, 256, 256, 130), (70, 4, 128, 20, None)],
)
def test_matrices_are_read_as_the_reference_reads_them(length, states, key_dim, value_dim, segment_length):
    q, gates, matrices, _ = _arguments(length, states, key_dim, value_dim, segment_length)
    expected = _read("reference")(q.astype(jnp.float32), gates, matrices)
    got = _interpreted(_read("gpu", segment_length), q, gates, matrices)
    assert got.dtype == jnp.bfloat16
    _assert_close("the result", got, expected)


def test_gradients_are_those_of_the_reference():
    q, gates, *others = arguments = _arguments(130, 5, 96, 96, 30)
    expected = jax.jit(_read_and_gradients("reference"))(q.astype(jnp.float32), gates, *others)
    got = _interpreted(_read_and_gradients("gpu", 30), *arguments)
    for name in TOLERANCES:
        pair = got[name], expected[name]
        if name == "gates":  # what no token may read has whatever gradient
            pair = [jnp.where(_readable(gates, 30), x, jnp.zeros_like(x)) for x in pair]
        assert pair[0].dtype == (jnp.bfloat16 if name in ("the result", "q") else jnp.float32)
        _assert_close(name, *pair)


def test_rows_and_heads_do_not_mix_and_what_no_token_may_read_is_not_touched():
    q, gates, states, _ = _arguments(100, 6, 64, 64, 40, batch=2, heads=2)
    poisoned = states.at[:, 2:].set(jnp.nan)
    got = _interpreted(_read("gpu", 40), q, gates, poisoned)
    _assert_close("the result", got, _read("reference")(q.astype(jnp.float32), gates, states))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_kernel_lowers_with_its_gradient(dim):
    lowered = lower_for_gpu(_read_and_gradients("gpu", 64), *_arguments(300, 4, dim, dim, heads=2))
    assert lowered.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mlp", [False, True], ids=["matrix", "mlp"])
def test_a_group_of_states_at_once_is_read_as_the_reference_reads_it(mlp, monkeypatch):
    monkeypatch.setattr(xla, "_GPU_GROUP", 3)  # two groups, the second filled up
    q, gates, states, out_bar = (x.astype(jnp.float64) for x in _arguments(21, 5, 4, 4, 4))
    states = (states, states[..., ::-1]) if mlp else states
    expected = jax.jit(_read_and_gradients("reference"))(q, gates, states, out_bar)
    with on_gpu():
        got = jax.jit(_read_and_gradients(None, 4))(q, gates, states, out_bar)
    for tree in (got, expected):
        tree["gates"] = jnp.where(_readable(gates, 4), tree["gates"], jnp.zeros_like(gates))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=jax.tree_util.keystr(path))


def test_without_a_name_xla_reads_on_gpus():
    assert "mosaic_gpu" not in lower_for_gpu(_read_and_gradients(None, 64), *_arguments(300, 4, 64, 64))


def test_what_the_kernel_cannot_read_is_refused_with_a_cure():
    q, gates, states, _ = _arguments(3, 2, 64, 64)
    wide, wide_gates, wide_states, _ = _arguments(3, 2, 320, 64)
    for message, *arguments in (
        ("of bfloat16; leave implementation out", q.astype(jnp.float32), gates, states),
        ("reads MLPs", q, gates, (states, states)),
        ("256 at most", wide, wide_gates, wide_states),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            gated_state_read(*arguments, implementation="gpu")
        assert "\n" not in str(caught.value)
    with on_gpu(AMPERE), pytest.raises(ValueError, match="but Hopper's"):
        gated_state_read(q, gates, states, implementation="gpu")

"""The TPU's sparse read in interpret mode against the reference, and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS, lower_for

from pallas_kernels import routed_state_read
from pallas_kernels.routed_read import _tpu_chains, _tpu_lists, tpu

KERNELS = ("tpu_union", "tpu_pairs")

# RMS ratios: rounding to bfloat16 of states, of gates times queries and of results is what is allowed.
BFLOAT16 = {"the result": 5e-3, "q": 8e-3, "gates": 2e-2, "states": 8e-3}
FLOAT32 = dict.fromkeys(BFLOAT16, 1e-5)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 128 tokens, so that a short row has two."""
    monkeypatch.setattr(_tpu_lists, "_PAIRS", 256)
    monkeypatch.setattr(_tpu_chains, "_STEP", 128)


def _arguments(length, states, choices, key_dim, value_dim, *, heads=1):
    keys = jax.random.split(jax.random.key(length), 4)
    gates, indices = jax.lax.top_k(jax.random.normal(keys[1], (1, length, heads, states)), choices)
    return (
        jax.random.normal(keys[0], (1, length, heads, key_dim)),
        gates,
        indices,
        jax.random.normal(keys[2], (1, states, heads, key_dim, value_dim)) / key_dim**0.5,
        jax.random.normal(keys[3], (1, length, heads, value_dim)),
    )


def _read_and_gradients(implementation, q, gates, indices, states, out_bar):
    def read(q, gates, states):
        return routed_state_read(q, gates, indices, states, implementation=implementation)

    @jax.jit
    def run(q, gates, states):
        out, vjp = jax.vjp(read, q, gates, states)
        return out, *vjp(out_bar.astype(out.dtype))

    return dict(zip(("the result", "q", "gates", "states"), run(q, gates, states), strict=True))


def _assert_close(kernel, arguments, tolerance, dtype=jnp.float32, *, detect_races=False):
    q, gates, indices, states, out_bar = arguments
    rounded = q.astype(dtype).astype(q.dtype)
    expected = _read_and_gradients("reference", rounded, gates, indices, states, out_bar)
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races)
    ):
        got = _read_and_gradients(kernel, q.astype(dtype), gates, indices, states, out_bar)
        jax.block_until_ready(got)
    assert got["the result"].dtype == got["q"].dtype == dtype
    for name, theirs in expected.items():
        a, b = (np.asarray(x, np.float64).ravel() for x in (got[name], theirs))
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)
        assert error < tolerance[name], f"{name} (or the gradient of it) is off: {error}"


@pytest.mark.parametrize(
    ("length", "states", "choices", "key_dim", "value_dim", "heads"),
    [(1, 3, 1, 64, 64, 1), (30, 9, 3, 96, 20, 1), (20, 5, 2, 256, 128, 2)],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_matrices_are_read_as_the_reference_reads_them(
    kernel, length, states, choices, key_dim, value_dim, heads
):
    _assert_close(kernel, _arguments(length, states, choices, key_dim, value_dim, heads=heads), FLOAT32)


@pytest.mark.usefixtures("small_pieces")
def test_blocks_read_the_union_of_their_tokens_choices():
    # More states than a word has bits; blocks of two steps, the last of them short, that read 40 and 10.
    q, gates, indices, states, out_bar = _arguments(150, 40, 9, 32, 16)
    indices = indices.at[:, 128:].set(indices[:, 128:] % 10)
    _assert_close("tpu_union", (q, gates, indices, states, out_bar), FLOAT32)


@pytest.mark.usefixtures("small_pieces")
def test_no_copy_races_another_where_pieces_add_to_a_gradient():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what tells of races

    for kernel in KERNELS:
        _assert_close(kernel, _arguments(135, 11, 1, 16, 16), FLOAT32, detect_races=True)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("choose", [lambda i: i, jnp.zeros_like], ids=["spread", "all the same"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_accurate_to_rounding(kernel, choose):
    q, gates, indices, states, out_bar = _arguments(70, 6, 2, 64, 64)
    _assert_close(kernel, (q, gates, choose(indices), states, out_bar), BFLOAT16, jnp.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_states_that_no_token_reads_are_not_touched(kernel):
    q, gates, indices, states, out_bar = _arguments(12, 4, 2, 16, 16)
    expected = _read_and_gradients("reference", q, gates, indices, states, out_bar)
    # The four are the second to the fifth of twelve.
    poisoned = jnp.pad(states, ((0, 0), (1, 7), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
    with pltpu.force_tpu_interpret_mode():
        got = _read_and_gradients(kernel, q, gates, indices + 1, poisoned, out_bar)
        jax.block_until_ready(got)
    for name in ("the result", "q", "gates"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["states"][:, 1:5], expected["states"], rtol=1e-4, atol=1e-5)
    assert not np.any(got["states"][:, :1])
    assert not np.any(got["states"][:, 5:])


def _described(dim, *, dtype=jnp.bfloat16, length=1024, states=16, choices=2):
    tokens = jax.ShapeDtypeStruct((1, length, 2, dim), dtype)
    gates = jax.ShapeDtypeStruct((1, length, 2, choices), jnp.float32)
    indices = jax.ShapeDtypeStruct(gates.shape, jnp.int32)
    return tokens, gates, indices, jax.ShapeDtypeStruct((1, states, 2, dim, dim), jnp.float32), tokens


def _gradients(implementation, q, gates, indices, states, out_bar):
    def read(q, gates, states):
        return routed_state_read(q, gates, indices, states, implementation=implementation)

    out, vjp = jax.vjp(read, q, gates, states)
    return out, vjp(out_bar)


@pytest.mark.usefixtures("quick_tpu_compiler")
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward_compile(programs, chip):
    # As long as a piece can be, and longer. In test_budgets what is around the kernels is optimised, too.
    described = _described(128, length=33000, states=130)
    found = programs.compiled_for(chip, functools.partial(_gradients, "tpu"), *described)
    assert sum(found["kernels"].values()) == 4, "both kernels are there, forward and backward"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, jnp.float32), (96, jnp.bfloat16), (256, jnp.float32)])
def test_other_head_sizes_and_odd_lengths_compile_where_memory_is_least(programs, kernel, dim, dtype):
    shapes = _described(dim, dtype=dtype, length=5777, choices=3, states=8)
    found = programs.compiled_for("v4", functools.partial(_gradients, kernel), *shapes)
    assert sum(found["kernels"].values()) == 2


def test_the_default_is_the_kernel_on_a_tpu_and_not_elsewhere():
    run, described = functools.partial(_gradients, None), _described(64)
    assert "tpu_custom_call" in lower_for("v5e", run, *described).as_text()
    assert "tpu_custom_call" not in jax.jit(run).lower(*described).as_text()


def test_mlps_and_too_many_choices_have_no_kernel():
    q, gates, indices, states, _ = _arguments(3, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="MLPs have no kernel"):
        routed_state_read(q, gates, indices, (states, states), implementation="tpu")
    many = jnp.zeros((1, 3, 1, 1 << 17), jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        routed_state_read(q, many.astype(jnp.float32), many, states, implementation="tpu")


@pytest.mark.parametrize("agree", [True, False])
def test_which_kernel_runs_is_decided_while_the_program_runs(monkeypatch, agree):
    """Of choices on which neighbours agree the union; the other kernel is poisoned."""
    monkeypatch.setattr(tpu, "_AGREE", 2)
    other = tpu._tpu_pairs if agree else tpu._tpu_union
    for name in ("read", "read_bar"):
        run = getattr(other, name)
        monkeypatch.setattr(other, name, lambda *a, run=run: jax.tree.map(lambda x: x * jnp.nan, run(*a)))
    q, gates, indices, states, out_bar = _arguments(140, 12, 1, 16, 16)
    indices = indices // 6 if agree else indices  # two states a block, or all twelve
    _assert_close("tpu", (q, gates, indices, states, out_bar), FLOAT32)

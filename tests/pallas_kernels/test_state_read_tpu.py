"""The TPU's read in interpret mode against the reference, and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS, lower_for

from pallas_kernels import gated_state_read
from pallas_kernels.state_read import _tpu_matrix, _tpu_mlp, _tpu_tiling

# RMS ratios: rounding to bfloat16 of states, of gates times queries and of results is what is allowed.
BFLOAT16 = {"the result": 5e-3, "q": 8e-3, "gates": 2e-2, "states": 8e-3}
FLOAT32 = dict.fromkeys(BFLOAT16, 1e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, tiles and pieces so small that a short row has several of each."""
    for module in (_tpu_matrix, _tpu_mlp):
        monkeypatch.setattr(module, "_LENGTH", 128)
    monkeypatch.setattr(_tpu_mlp, "_BLOCK", 256)
    monkeypatch.setattr(_tpu_tiling, "_STATES_BYTES", 1 << 15)
    monkeypatch.setattr(_tpu_tiling, "_QUERIES_BYTES", 1 << 16)


def _arguments(length, states, key_dim, value_dim, *, hidden=None, batch=1, heads=1, segment_length=None):
    keys = jax.random.split(jax.random.key(length), 5)

    def weights(key, rows, columns):
        return jax.random.normal(key, (batch, states, heads, rows, columns)) / rows**0.5

    cached = weights(keys[2], key_dim, value_dim)
    if hidden is not None:
        cached = weights(keys[2], key_dim, hidden), weights(keys[3], hidden, value_dim)
    gates = jax.nn.softmax(jax.random.normal(keys[1], (batch, length, heads, states)))
    if segment_length is not None:
        gates = jnp.where(_readable(gates, segment_length), gates, jnp.zeros_like(gates))
    q = jax.random.normal(keys[0], (batch, length, heads, key_dim))
    return q, gates, cached, jax.random.normal(keys[4], (batch, length, heads, value_dim))


def _readable(gates, segment_length):
    _, length, _, states = gates.shape
    return (jnp.arange(states)[None] < jnp.arange(length)[:, None] // segment_length)[None, :, None]


def _read_and_gradients(implementation, q, gates, states, out_bar, **options):
    @jax.jit
    def run(q, gates, states):
        read = functools.partial(gated_state_read, **options, implementation=implementation)
        out, vjp = jax.vjp(read, q, gates, states)
        return out, *vjp(out_bar.astype(out.dtype))

    out, q_bar, gates_bar, states_bar = run(q, gates, states)
    segment_length = options["segment_length"]
    if segment_length is not None:
        # What no token may read has whatever gradient; it is 0 where it was skipped.
        gates_bar = jnp.where(_readable(gates, segment_length), gates_bar, jnp.zeros_like(gates_bar))
    return {"the result": out, "q": q_bar, "gates": gates_bar, "states": states_bar}


def _assert_close(
    arguments, tolerance, dtype=jnp.float32, segment_length=None, *, branch=None, detect_races=False
):
    q, gates, states, out_bar = arguments
    options = {"segment_length": segment_length, "branch": branch}
    expected = _read_and_gradients("reference", q, gates, states, out_bar, **options)
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races)
    ):
        got = _read_and_gradients("tpu", q.astype(dtype), gates, states, out_bar, **options)
        jax.block_until_ready(got)
    assert got["the result"].dtype == got["q"].dtype == dtype
    for name, theirs in expected.items():
        a, b = _flat(got[name]), _flat(theirs)
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)
        assert error < tolerance[name], f"{name} (or the gradient of it) is off: {error}"


def _flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("length", "states", "key_dim", "value_dim", "segment_length"),
    [(1, 3, 64, 64, None), (129, 13, 96, 96, None), (300, 9, 128, 128, 30), (257, 5, 256, 20, 64)],
)
def test_matrices_are_read_as_the_reference_reads_them(length, states, key_dim, value_dim, segment_length):
    arguments = _arguments(length, states, key_dim, value_dim, segment_length=segment_length)
    _assert_close(arguments, FLOAT32, segment_length=segment_length)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("length", "states", "key_dim", "hidden", "segment_length", "branch"),
    [
        (1, 2, 64, 100, None, "plain"),
        (129, 3, 96, 32, None, "bounded"),
        (300, 5, 128, 64, 50, "bounded"),
        (130, 2, 256, 16, 64, "plain"),
    ],
)
def test_mlps_are_read_as_the_reference_reads_them(length, states, key_dim, hidden, segment_length, branch):
    arguments = _arguments(length, states, key_dim, key_dim, hidden=hidden, segment_length=segment_length)
    _assert_close(arguments, FLOAT32, segment_length=segment_length, branch=branch)


@pytest.mark.parametrize("hidden", [None, 48], ids=["matrix", "mlp"])
def test_rows_and_heads_do_not_mix(hidden):
    arguments = _arguments(70, 6, 16, 16, hidden=hidden, batch=2, heads=2, segment_length=11)
    _assert_close(arguments, FLOAT32, segment_length=11)


def test_no_copy_of_states_races_another(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what tells of races

    monkeypatch.setattr(_tpu_matrix, "_LENGTH", 128)
    # Two blocks of tokens, of two heads; all states in VMEM at once, which come in three groups.
    arguments = _arguments(200, 9, 128, 16, heads=2, segment_length=20)
    _assert_close(arguments, FLOAT32, segment_length=20, detect_races=True)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim", "dtype", "tolerance"),
    [(300, 128, 64, jnp.float32, FLOAT32), (400, 96, 128, jnp.bfloat16, BFLOAT16)],
)
def test_blocks_for_wide_matrix_units_are_read_as_the_reference_reads_them(
    length, key_dim, value_dim, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(_tpu_matrix, "has_wide_units", lambda: True)
    # Products of 128 and fewer tokens, two in a block; tiles of 16 states and of fewer at once.
    monkeypatch.setattr(_tpu_matrix, "_COLUMNS", 128)
    monkeypatch.setattr(_tpu_matrix, "_LENGTH_WIDE", 256)
    monkeypatch.setattr(_tpu_matrix, "_ROWS", 8 * key_dim)
    arguments = _arguments(length, 29, key_dim, value_dim, segment_length=13)
    _assert_close(arguments, tolerance, dtype, segment_length=13)


@pytest.mark.parametrize("hidden", [None, 128], ids=["matrix", "mlp"])
def test_bfloat16_is_accurate_to_rounding(hidden):
    arguments = _arguments(600, 17, 64, 64, hidden=hidden, segment_length=35)
    _assert_close(arguments, BFLOAT16, jnp.bfloat16, segment_length=35)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("hidden", [None, 32], ids=["matrix", "mlp"])
def test_states_that_no_token_may_read_are_not_touched(hidden):
    q, gates, states, out_bar = _arguments(200, 12, 32, 32, hidden=hidden, segment_length=64)
    readable = jax.tree.map(lambda leaf: leaf[:, :4], states)
    expected = _read_and_gradients("reference", q, gates[..., :4], readable, out_bar, segment_length=64)
    poisoned = jax.tree.map(lambda leaf: leaf.at[:, 4:].set(jnp.nan), states)
    with pltpu.force_tpu_interpret_mode():
        got = _read_and_gradients("tpu", q, gates, poisoned, out_bar, segment_length=64)
        jax.block_until_ready(got)
    np.testing.assert_allclose(got["the result"], expected["the result"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["q"], expected["q"], rtol=1e-4, atol=1e-5)
    assert not np.any(got["gates"][..., 4:])
    for leaf in jax.tree.leaves(got["states"]):
        assert np.any(leaf[:, :3])
        assert not np.any(leaf[:, 4:])


def _described(dim, *, dtype=jnp.bfloat16, hidden=None, length=1024, states=16):
    def weights(rows, columns):
        return jax.ShapeDtypeStruct((1, states, 2, rows, columns), jnp.float32)

    tokens = jax.ShapeDtypeStruct((1, length, 2, dim), dtype)
    cached = weights(dim, dim) if hidden is None else (weights(dim, hidden), weights(hidden, dim))
    return tokens, jax.ShapeDtypeStruct((1, length, 2, states), jnp.float32), cached, tokens


def _gradients(implementation, segment_length=256):
    def run(q, gates, states, out_bar):
        read = functools.partial(
            gated_state_read, segment_length=segment_length, implementation=implementation
        )
        out, vjp = jax.vjp(read, q, gates, states)
        return out, vjp(out_bar)

    return run


# For the other chips this size compiles in test_budgets.
@pytest.mark.parametrize("hidden", [None, 512], ids=["matrix", "mlp"])
def test_forward_and_backward_compile(programs, hidden):
    found = programs.compiled_for("v4", _gradients("tpu"), *_described(128, hidden=hidden))
    assert sum(found["kernels"].values()) == 2


# At the sizes of 760M and 1.3B.
@pytest.mark.parametrize(("dim", "hidden"), [(96, None), (256, None), (96, 384), (256, 1024)])
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward_compile_at_the_recipes_sizes(programs, chip, dim, hidden):
    described = _described(dim, hidden=hidden, length=4096)
    found = programs.compiled_for(chip, _gradients("tpu"), *described)
    assert sum(found["kernels"].values()) == 2


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, jnp.float32), (96, jnp.bfloat16), (256, jnp.bfloat16), (256, jnp.float32)],
    ids=["64-float32", "96-bfloat16", "256-bfloat16", "256-float32"],
)
def test_other_head_sizes_and_odd_lengths_compile_where_memory_is_least(programs, dim, dtype):
    for hidden in (None, 2 * dim):
        described = _described(dim, dtype=dtype, hidden=hidden, length=777)
        found = programs.compiled_for("v4", _gradients("tpu"), *described)
        assert sum(found["kernels"].values()) == 2


def test_the_default_is_the_kernel_on_a_tpu_and_not_elsewhere():
    described = _described(64)
    assert "tpu_custom_call" in lower_for("v5e", _gradients(None), *described).as_text()
    assert "tpu_custom_call" not in jax.jit(_gradients(None)).lower(*described).as_text()

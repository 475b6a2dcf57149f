"""The TPU's MLP memory in interpret mode against the reference, and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS, lower_for

from pallas_kernels.deep_memory import _tpu_layout, deep_memory

# RMS ratios: what rounding to bfloat16 of tokens, weights and writes costs.
BFLOAT16 = {
    "the branch": 5e-3,
    "states": 5e-3,
    "the final weights": 5e-3,
    "the final anchor": 5e-3,
    # A few writes alone, where the weights are a sum of many.
    "the final momentum": 1e-2,
    "q": 8e-3,
    "k": 8e-3,
    "v": 8e-3,
    "initial_state": 8e-3,
    "retention": 2e-2,
    "momentum": 2e-2,
    "step": 2e-2,
}
FLOAT32 = dict.fromkeys(BFLOAT16, 1e-5)


def _arguments(length, dim, hidden, *, objective="l2", batch=1, heads=1):
    """What is differentiated; the initial W_in is shared by the rows, W_out is not."""
    keys = iter(jax.random.split(jax.random.key(length), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    def tokens():
        x = normal(batch, length, heads, dim)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    arguments = {
        "q": tokens(),
        "k": tokens(),
        "v": tokens(),
        "retention": jax.nn.sigmoid(normal(batch, length, heads) + 3),
        "step": jax.nn.sigmoid(normal(batch, length, heads)) / 4,
        "initial_state": (normal(heads, dim, hidden) / 2, normal(batch, heads, hidden, dim) / hidden**0.5),
    }
    if objective == "l2":
        arguments["momentum"] = jax.nn.sigmoid(normal(batch, length, heads))
    return arguments


def _outputs_and_gradients(implementation, arguments, options):
    """Outputs (0 past the rows' ends) and gradients, by name; every output has a random cotangent."""
    lengths = options.get("lengths")

    def run(arguments):
        branch, states, final = deep_memory(**arguments, **options, implementation=implementation)
        if lengths is not None:
            written = jnp.arange(branch.shape[1])[None] < lengths[:, None]
            branch = jnp.where(written[..., None, None], branch, jnp.zeros_like(branch))
        return {
            "the branch": branch,
            "states": states,
            "the final weights": final.weights,
            "the final momentum": final.momentum,
            "the final anchor": final.anchor,
        }

    @jax.jit
    def with_gradients(arguments):
        outputs, vjp = jax.vjp(run, arguments)
        leaves, tree = jax.tree.flatten(outputs)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        bars = [
            jax.random.normal(key, leaf.shape).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return outputs, *vjp(jax.tree.unflatten(tree, bars))

    outputs, gradients = with_gradients(arguments)
    return outputs | gradients


def _assert_close(arguments, tolerance=FLOAT32, dtype=jnp.float32, **options):
    options = {"objective": "l2" if "momentum" in arguments else "dot", **options}
    tokens = {name: arguments[name].astype(dtype) for name in "qkv"}
    wide = {name: x.astype(jnp.float32) for name, x in tokens.items()}
    expected = _outputs_and_gradients("reference", arguments | wide, options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = _outputs_and_gradients("tpu", arguments | tokens, options)
        jax.block_until_ready(got)
    assert got["the branch"].dtype == got["q"].dtype == dtype
    for name, theirs in expected.items():
        for ours, leaf in zip(jax.tree.leaves(got[name]), jax.tree.leaves(theirs), strict=True):
            a, b = np.asarray(ours, np.float64), np.asarray(leaf, np.float64)
            error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)
            assert error < tolerance[name], f"{name} (or the gradient of it) is off: {error}"


@pytest.mark.parametrize(
    ("objective", "length", "dim", "hidden", "segment_init", "branch"),
    [
        ("l2", 33, 64, 100, "checkpoint", "bounded"),
        ("l2", 70, 96, 128, "independent", "plain"),
        ("dot", 64, 128, 160, "checkpoint", "bounded"),
        ("dot", 20, 96, 100, "independent", "plain"),
    ],
)
def test_it_is_what_the_reference_is(objective, length, dim, hidden, segment_init, branch):
    arguments = _arguments(length, dim, hidden, objective=objective)
    _assert_close(arguments, segment_length=32, chunk_length=16, segment_init=segment_init, branch=branch)


def test_a_row_shorter_than_a_chunk():
    _assert_close(_arguments(5, 32, 64), segment_length=16, chunk_length=8)


@pytest.mark.parametrize("segment_init", ["checkpoint", "independent"])
def test_rows_end_and_documents_begin_where_they_do(segment_init, monkeypatch):
    # Two blocks a segment; chunks of 5 tokens are padded.
    monkeypatch.setattr(_tpu_layout, "_MOST_CHUNKS", 2)
    _assert_close(
        _arguments(50, 24, 48, batch=3, heads=2),
        segment_length=20,
        chunk_length=5,
        segment_init=segment_init,
        lengths=jnp.array([50, 32, 15]),
        document_ids=jnp.array([[0] * 10 + [1] * 10 + [2] * 30, [0] * 25 + [1] * 25, [0] * 50]),
    )


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_bfloat16_is_accurate_to_rounding(objective):
    arguments = _arguments(256, 64, 128, objective=objective)
    _assert_close(arguments, BFLOAT16, jnp.bfloat16, segment_length=128, chunk_length=32)


def test_coefficients_may_be_nothing_or_everything():
    arguments = _arguments(48, 32, 64)
    arguments["retention"] = arguments["retention"].at[:, ::7].set(0)
    arguments["momentum"] = arguments["momentum"].at[:, ::5].set(0).at[:, ::3].set(1)
    _assert_close(arguments, segment_length=32, chunk_length=16)


def _described(dim, hidden, *, objective="l2", dtype=jnp.bfloat16, length=4096, heads=8):
    tokens = jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
    numbers = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    w_in, w_out = (heads, dim, hidden), (heads, hidden, dim)
    arguments = {
        **dict.fromkeys("qkv", tokens),
        **dict.fromkeys(("retention", "step"), numbers),
        "initial_state": tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (w_in, w_out)),
    }
    return arguments | ({"momentum": numbers} if objective == "l2" else {})


def _gradients(implementation, segment_init="checkpoint"):
    def run(arguments):
        memory = functools.partial(
            deep_memory,
            objective="l2" if "momentum" in arguments else "dot",
            segment_length=256,
            segment_init=segment_init,
            implementation=implementation,
        )
        outputs, vjp = jax.vjp(lambda arguments: memory(**arguments), arguments)
        return outputs, vjp(outputs)

    return run


# At the sizes of 760M and 1.3B, in turn, for a program takes half a minute to compile. A v4
# has a quarter of the VMEM that a state of 1.3B takes: there XLA's version runs.
@pytest.mark.parametrize(
    ("objective", "chip", "heads", "dim"),
    [
        (objective, chip, *((8, 256) if chip != "v4" and (place + first) % 2 else (16, 96)))
        for first, objective in enumerate(("l2", "dot"))
        for place, chip in enumerate(CHIPS)
    ],
)
def test_forward_and_backward_compile(programs, objective, chip, heads, dim):
    described = _described(dim, 4 * dim, heads=heads, objective=objective)
    found = programs.compiled_for(chip, _gradients("tpu"), described)
    assert sum(found["kernels"].values()) == 2


@pytest.mark.parametrize(
    ("chip", "dim", "hidden", "dtype"),
    [
        ("v4", 128, 256, jnp.float32),
        ("v5p", 256, 512, jnp.bfloat16),
    ],
)
def test_other_sizes_and_odd_lengths_compile_where_memory_is_less(programs, chip, dim, hidden, dtype):
    for objective, segment_init in (("l2", "checkpoint"), ("dot", "independent")):
        described = _described(dim, hidden, objective=objective, dtype=dtype, length=777, heads=2)
        found = programs.compiled_for(chip, _gradients("tpu", segment_init), described)
        assert sum(found["kernels"].values()) == 2


def test_states_too_large_for_the_chip_are_refused_with_the_cure():
    described = _described(256, 1024)
    with pytest.raises(ValueError, match="too large for the chip's VMEM, here of \\(8, 256, 1024\\)"):
        lower_for("v4", _gradients("tpu"), described)


def test_the_default_is_the_kernel_on_a_tpu_and_not_elsewhere():
    described = _described(64, 128, length=512, heads=2)
    assert "tpu_custom_call" in lower_for("v5e", _gradients(None), described).as_text()
    assert "tpu_custom_call" not in jax.jit(_gradients(None)).lower(described).as_text()

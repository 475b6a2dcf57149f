"""The TPU's matrix memory in interpret mode against the reference, and compiled for chips not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tpu_topology import CHIPS, lower_for

from pallas_kernels import chunk_memory
from pallas_kernels.chunk_memory import _tpu_layout

RULES = ("linear", "swla", "delta", "titans")
# RMS ratios: what rounding to bfloat16 of tokens, scores and writes costs.
BFLOAT16 = {
    "the reads": 5e-3,
    "states": 5e-3,
    "the final state": 5e-3,
    "q": 8e-3,
    "k": 8e-3,
    "v": 8e-3,
    "initial_state": 8e-3,
    "retention": 2e-2,
    "step": 2e-2,
    "previous_step": 2e-2,
    "momentum": 2e-2,
}
FLOAT32 = dict.fromkeys(BFLOAT16, 1e-5)


def _arguments(rule, length, key_dim, value_dim, *, batch=1, heads=1, initial=True):
    keys = iter(jax.random.split(jax.random.key(length), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    arguments = {
        "q": unit(normal(batch, length, heads, key_dim)),
        "k": unit(normal(batch, length, heads, key_dim)),
        "v": normal(batch, length, heads, value_dim),
        "retention": jax.nn.sigmoid(normal(batch, length, heads) + 3),
        "step": jax.nn.sigmoid(normal(batch, length, heads)),
    }
    if initial:
        arguments["initial_state"] = normal(batch, heads, key_dim, value_dim)
    if rule == "swla":
        arguments["previous_step"] = jax.nn.sigmoid(normal(batch, length, heads))
    if rule == "titans":
        arguments["momentum"] = jax.nn.sigmoid(normal(batch, length, heads))
        arguments["step"] = arguments["step"] / 16
    return arguments


def _outputs_and_gradients(implementation, arguments, options):
    """Outputs (0 past the rows' ends) and gradients, by name; every output has a random cotangent."""
    lengths = options.get("lengths")

    def run(arguments):
        reads, states, final = chunk_memory(**arguments, **options, implementation=implementation)
        if lengths is not None:
            written = jnp.arange(reads.shape[1])[None] < lengths[:, None]
            reads = jnp.where(written[..., None, None], reads, jnp.zeros_like(reads))
        return {"the reads": reads, "states": states, "the final state": final}

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
    options = {"chunk_length": 1, **options}
    tokens = {name: arguments[name].astype(dtype) for name in "qkv"}
    wide = {name: x.astype(jnp.float32) for name, x in tokens.items()}
    expected = _outputs_and_gradients("reference", arguments | wide, options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = _outputs_and_gradients("tpu", arguments | tokens, options)
        jax.block_until_ready(got)
    assert got["the reads"].dtype == got["q"].dtype == dtype
    for name, theirs in expected.items():
        for ours, leaf in zip(jax.tree.leaves(got[name]), jax.tree.leaves(theirs), strict=True):
            a, b = np.asarray(ours, np.float64), np.asarray(leaf, np.float64)
            error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
            assert error < tolerance[name], f"{name} (or the gradient of it) is off: {error}"


# Each compiles for a quarter of a minute. One kernel is that of linear and swla, one that of delta and
# titans: each has all of these sizes, by one rule or by the other.
@pytest.mark.parametrize(
    ("rules", "length", "key_dim", "value_dim", "segment_length", "segment_init"),
    [
        (("linear", "titans"), 1, 64, 64, 64, "checkpoint"),
        (("swla", "delta"), 300, 96, 96, 150, "independent"),
        (("linear", "titans"), 401, 128, 64, 384, "checkpoint"),
        (("swla", "delta"), 520, 32, 256, 257, "checkpoint"),
    ],
)
@pytest.mark.parametrize("kernel", [0, 1], ids=["sum", "errors"])
def test_it_is_what_the_reference_is(kernel, rules, length, key_dim, value_dim, segment_length, segment_init):
    rule = rules[kernel]
    arguments = _arguments(rule, length, key_dim, value_dim)
    _assert_close(arguments, rule=rule, segment_length=segment_length, segment_init=segment_init)


# Both kernels, by one rule from the checkpoint and by the other one anew.
@pytest.mark.parametrize(
    ("rule", "segment_init"), list(zip(RULES, ("checkpoint", "independent") * 2, strict=True))
)
def test_rows_end_and_documents_begin_where_they_do(rule, segment_init, monkeypatch):
    # Blocks so short that a segment has several, on the way back too.
    monkeypatch.setattr(_tpu_layout, "_LENGTH_BACKWARD", 128)
    arguments = _arguments(rule, 600, 32, 32, batch=3, heads=2)
    documents = jnp.asarray([[0] * 600, [0] * 5 + [1] * 595, [0] * 128 + [1] * 2 + [2] * 398 + [3] * 72])
    _assert_close(
        arguments,
        rule=rule,
        segment_length=300,
        segment_init=segment_init,
        document_ids=documents,
        lengths=jnp.asarray([600, 1, 550]),
    )


@pytest.mark.parametrize("rule", ["linear", "swla", "delta"])  # titans below, by chunks
def test_bfloat16_is_accurate_to_rounding(rule):
    arguments = _arguments(rule, 600, 64, 64, initial=False)
    _assert_close(arguments, BFLOAT16, jnp.bfloat16, rule=rule, segment_length=256)


@pytest.mark.parametrize(
    ("length", "chunk_length", "segment_length", "segment_init"),
    [
        (300, 64, 256, "checkpoint"),
        (290, 24, 144, "independent"),
        (100, 128, 256, "checkpoint"),
    ],
)
def test_titans_takes_errors_at_the_starts_of_chunks(length, chunk_length, segment_length, segment_init):
    _assert_close(
        _arguments("titans", length, 32, 64, batch=2),
        rule="titans",
        chunk_length=chunk_length,
        segment_length=segment_length,
        segment_init=segment_init,
        document_ids=jnp.stack([jnp.arange(length) // chunk_length // 2, jnp.zeros(length, jnp.int32)]),
        lengths=jnp.asarray([length, length - 7]),
    )


def test_a_chunk_of_bfloat16_is_accurate_to_rounding():
    arguments = _arguments("titans", 600, 128, 128, initial=False)
    _assert_close(arguments, BFLOAT16, jnp.bfloat16, rule="titans", chunk_length=64, segment_length=256)


@pytest.mark.parametrize("rule", ["delta", "titans"])
def test_errors_are_exact_where_coefficients_are_nothing_or_missing(rule):
    arguments = _arguments(rule, 200, 32, 32)
    arguments["retention"] = arguments["retention"].at[:, ::3].set(0.0)
    if rule == "titans":
        arguments["momentum"] = arguments["momentum"].at[:, ::5].set(0.0)
    _assert_close(arguments, rule=rule, segment_length=128)
    for name in ("retention", "momentum", "initial_state"):
        arguments.pop(name, None)
    if rule == "delta":
        del arguments["step"]
    _assert_close(arguments, rule=rule, chunk_length=64, segment_length=128)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_delta_is_solved_also_where_keys_are_nearly_parallel(noise):
    arguments = _arguments("delta", 256, 32, 32)
    arguments["k"] = arguments["k"][:, :1] + noise * arguments["k"]
    arguments["k"] /= jnp.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    arguments["step"] = jnp.ones_like(arguments["step"])
    _assert_close(arguments, dict.fromkeys(FLOAT32, 3e-5), rule="delta", segment_length=256)


def test_coefficients_may_be_nothing_or_everything():
    arguments = _arguments("linear", 200, 32, 32)
    tolerance = dict.fromkeys(FLOAT32, 1e-4)
    whole = arguments | {"retention": jnp.ones_like(arguments["retention"])}
    _assert_close(whole, tolerance, rule="linear", segment_length=128)
    # The gradient goes through the logarithm, and so is 0 where that would be minus infinity.
    nothing = arguments | {"retention": jnp.zeros_like(arguments["retention"])}
    _assert_close(nothing, tolerance | {"retention": 1.0}, rule="linear", segment_length=128)
    del arguments["retention"], arguments["step"], arguments["initial_state"]
    _assert_close(arguments, rule="linear", segment_length=128)


def test_what_has_no_kernel_is_refused_with_the_cure():
    arguments = _arguments("titans", 256, 16, 16)
    with pytest.raises(ValueError, match="leave implementation out, or choose 'xla'"):
        chunk_memory(**arguments, rule="titans", segment_length=256, chunk_length=256, implementation="tpu")


def _described(dim, *, dtype=jnp.bfloat16, length=4096, heads=16):
    tokens = jax.ShapeDtypeStruct((1, length, heads, dim), dtype)
    return tokens, tokens, tokens, jax.ShapeDtypeStruct((1, length, heads), jnp.float32)


def _gradients(implementation, rule="linear", segment_init="checkpoint"):
    def run(q, k, v, retention):
        def memory(q, k, v, retention):
            name = {"swla": "previous_step", "titans": "momentum"}.get(rule)
            more = {name: 1 - retention} if name else {}
            reads, states, final = chunk_memory(
                q,
                k,
                v,
                rule=rule,
                retention=retention,
                segment_length=256,
                segment_init=segment_init,
                implementation=implementation,
                **more,
            )
            return reads, states, final.weights

        results, vjp = jax.vjp(memory, q, k, v, retention)
        return results, vjp(results)

    return run


# At the sizes of 760M and 1.3B.
@pytest.mark.parametrize(("heads", "dim"), [(16, 96), (8, 256)])
@pytest.mark.parametrize("rule", ["linear", "delta", "titans"])
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward_compile(programs, chip, rule, heads, dim):
    found = programs.compiled_for(chip, _gradients("tpu", rule), *_described(dim, heads=heads))
    assert sum(found["kernels"].values()) == 2


@pytest.mark.parametrize(("batch", "groups"), [(1, 2), (2, 2), (3, 6)])
def test_two_cores_share_the_heads_of_an_odd_row(batch, groups, monkeypatch):
    monkeypatch.setattr(_tpu_layout, "cores", lambda: 2)
    q = jax.ShapeDtypeStruct((batch, 256, 16, 128), jnp.bfloat16)
    options = {"segment_length": 256, "independent": False, "documents": False, "backward": False}
    cut = _tpu_layout.Cut.fit(q, 128, **options)
    assert batch * cut.heads // cut.group == groups, "a core stands still while the other works"


# The least and the most that a head takes.
@pytest.mark.parametrize(("dim", "dtype"), [(64, jnp.bfloat16), (256, jnp.float32)], ids=["least", "most"])
@pytest.mark.parametrize(("rule", "kernels"), [("swla", 4), ("delta", 2), ("titans", 2)])
def test_other_sizes_and_odd_lengths_compile_where_memory_is_least(programs, rule, kernels, dim, dtype):
    described = _described(dim, dtype=dtype, length=777)
    found = programs.compiled_for("v4", _gradients("tpu", rule, "independent"), *described)
    assert sum(found["kernels"].values()) == kernels


def test_the_default_is_the_kernel_on_a_tpu_and_not_elsewhere():
    described = _described(64, length=512, heads=4)
    assert lower_for("v5e", _gradients(None), *described).as_text().count("tpu_custom_call") == 2
    assert "tpu_custom_call" not in jax.jit(_gradients(None)).lower(*described).as_text()

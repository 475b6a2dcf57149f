import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.config import ModelConfig
from mc_jax.nn import LanguageModel

TINY = ModelConfig(
    num_layers=2, model_dim=16, num_heads=2, mlp_dim=24, segment_length=8, chunk_length=4, aggregation="gated"
)
VOCABULARY = 19
# What memories do is in tests/inference/test_invariance.py, in float64, which JAX's attention does not know.
ATTENTION = [
    {"layer_pattern": ("memory", "window"), "attention_window": 5},
    {"layer_pattern": ("attention",)},
]


def _model(**changes):
    return LanguageModel(dataclasses.replace(TINY, **changes), VOCABULARY, rngs=nnx.Rngs(params=0))


def _tokens(length, batch=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCABULARY, jnp.int32)


def _identity(settings):
    return "-".join(str(value).replace("'", "") for value in settings.values())


@pytest.mark.parametrize("settings", ATTENTION, ids=_identity)
def test_decoding_token_by_token_equals_the_parallel_form(settings):
    model, tokens = _model(**settings), _tokens(29)
    expected = jax.jit(model)(tokens)
    lengths = jnp.array([11, 8], jnp.int32)  # within a segment, and just at one's end
    logits, caches = jax.jit(lambda t: model.prefill(t, lengths, 32))(tokens[:, :16])
    step = jax.jit(model.step)
    rows = jnp.arange(2)
    for _ in range(17):
        np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=2e-5)
        logits, caches = step(tokens[rows, lengths], caches)
        lengths = lengths + 1
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=2e-5)


@pytest.mark.parametrize("settings", ATTENTION, ids=_identity)
def test_a_later_token_changes_nothing_before_it(settings):
    model, tokens = _model(**settings), _tokens(21)
    run = jax.jit(model)
    before = run(tokens)
    for place in (0, 7, 8, 13, 20):
        after = run(tokens.at[:, place].add(1) % VOCABULARY)
        np.testing.assert_array_equal(before[:, :place], after[:, :place])
        assert not np.allclose(before[:, place:], after[:, place:])


@pytest.mark.parametrize("settings", ATTENTION, ids=_identity)
def test_packed_documents_do_not_see_each_other(settings):
    model = _model(**settings)
    first, second = _tokens(13, seed=1), _tokens(14, seed=2)
    ids = jnp.concatenate([jnp.zeros((2, 13), jnp.int32), jnp.ones((2, 14), jnp.int32)], axis=1)
    run = jax.jit(model)
    packed = run(jnp.concatenate([first, second], axis=1), ids)
    other = run(jnp.concatenate([(first + 3) % VOCABULARY, second], axis=1), ids)
    np.testing.assert_array_equal(packed[:, 13:], other[:, 13:])
    np.testing.assert_allclose(packed[:, :13], jax.jit(model)(first), atol=2e-5)


def test_a_token_outside_the_vocabulary_is_an_error_and_in_compiled_code_nan_from_there_on():
    model, tokens = _model(layer_pattern=("memory", "window"), attention_window=5), _tokens(21)
    ids = jnp.broadcast_to((jnp.arange(21) >= 13).astype(jnp.int32)[None], (2, 21))
    wrong = tokens.at[0, 5].set(VOCABULARY).at[1, 15].set(-1)
    with pytest.raises(ValueError, match="outside the vocabulary of 19"):
        model(wrong)
    run = jax.jit(model)
    expected, found = run(tokens, ids), run(wrong, ids)
    spoilt = np.zeros((2, 21), bool)
    spoilt[0, 5:13] = spoilt[1, 15:] = True
    np.testing.assert_array_equal(np.isnan(found).all(-1), spoilt)
    np.testing.assert_array_equal(found[~spoilt], expected[~spoilt])

    lengths = jnp.array([11, 8], jnp.int32)  # row 1 ends before its unknown token
    logits, caches = jax.jit(lambda t: model.prefill(t, lengths, 32))(wrong)
    np.testing.assert_array_equal(np.isnan(logits).any(-1), [True, False])
    for token in (jnp.array([3, 3]), jnp.array([3, VOCABULARY]), jnp.array([3, 3])):
        logits, caches = jax.jit(model.step)(token.astype(jnp.int32), caches)
    assert np.isnan(logits).all(), "what a cache has of an unknown token stays NaN"


def test_gates_of_a_token_sum_to_one_and_leave_out_what_it_may_not_read():
    gates = jax.jit(_model().read_gates)(_tokens(20))
    assert gates.cached.shape == (2, 2, 20, 2, 3)
    total = gates.online + jnp.sum(gates.cached, axis=-1)
    np.testing.assert_allclose(total, jnp.ones_like(total), atol=1e-6)
    assert not np.any(gates.cached[:, :, :8]), "the first segment has nothing to read"
    assert not np.any(gates.cached[..., 2]), "no token comes after the last segment"
    assert np.all(gates.cached[:, :, 16:, :, :2] > 0)


def test_running_out_of_places_gives_nan_and_not_a_wrong_answer():
    model, tokens = _model(), _tokens(24)
    _, caches = jax.jit(lambda t: model.prefill(t, jnp.full((2,), 8, jnp.int32), 16))(tokens[:, :8])
    step = jax.jit(model.step)
    finite = []
    for place in range(8, 24):
        logits, caches = step(tokens[:, place], caches)
        finite.append(bool(jnp.all(jnp.isfinite(logits))))
    assert all(finite), "two segments fit"
    for _ in range(9):
        logits, caches = step(tokens[:, 0], caches)
    assert jnp.all(jnp.isnan(logits)), "a third one does not"


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    model = LanguageModel(TINY, VOCABULARY, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    exact = LanguageModel(TINY, VOCABULARY, rngs=nnx.Rngs(params=0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits, expected = jax.jit(model)(_tokens(20)), jax.jit(exact)(_tokens(20))
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean(np.square(logits - expected))) < 0.1 * np.std(expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"router_keys": "keys"}, "router_keys 'keys'"), ({"aggregation": "none"}, "aggregation 'none'")],
)
def test_a_width_that_no_router_would_have_is_an_error(settings, reason):
    with pytest.raises(ValueError, match=f"router_dim 3 has no effect with {reason}; leave it out"):
        _model(router_dim=3, **settings)


def test_parameter_names_are_fixed_because_checkpoints_know_them():
    names = {
        ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(_model())))
    }
    mixer = """query.kernel key.kernel value.kernel convolution.taps retention.log_rate
        retention.map.kernel retention.map.bias step_size.map.kernel step_size.map.bias router_query.kernel
        router_key.kernel online_logit.kernel norm.scale output_gate.kernel output.kernel"""
    mixer = {f"blocks_0.mixer.{name}" for name in mixer.split()}
    block = "mixer_norm.scale mlp_norm.scale mlp.gate.kernel mlp.input.kernel mlp.output.kernel"
    rest = {f"blocks_0.{name}" for name in block.split()} | {"norm.scale", "embedding"}
    assert names == mixer | rest

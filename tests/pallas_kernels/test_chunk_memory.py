"""The chunk recurrence: the chunked form against the token loop, and the token loop against plain NumPy.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunk_memory, memory_step
from pallas_kernels._state import batch_weights, initial_online_state
from pallas_kernels.chunk_memory import gpu

pytestmark = pytest.mark.xdist_group("chunk_memory")  # one worker: they share what is compiled

B, H, K, V = 2, 2, 4, 3
SEGMENT, CHUNK = 12, 4
TOKENS = 29  # two segments and a short one, whose last chunk is short as well
RULES = ("linear", "swla", "delta", "titans")
GPU_RULES = ("linear", "swla", "delta")
INITS = ("checkpoint", "independent")
COEFFICIENTS = {
    "linear": ("retention", "step"),
    "swla": ("retention", "step", "previous_step"),
    "delta": ("retention", "step"),
    "titans": ("retention", "step", "momentum"),
}


def make(rule, tokens=TOKENS, seed=0, coefficients=True, dtype=np.float64):
    """Return random differentiable arguments of `chunk_memory`."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape) / K**0.5

    arguments = {"q": normal(B, tokens, H, K), "k": normal(B, tokens, H, K), "v": normal(B, tokens, H, V)}
    if coefficients:
        for name in COEFFICIENTS[rule]:
            arguments[name] = generator.uniform(0.3, 1.0, (B, tokens, H))
        arguments["initial_state"] = normal(H, K, V)
    return {name: jnp.asarray(value, dtype) for name, value in arguments.items()}


def documents(rule, tokens=TOKENS):
    """Return ids of documents that start inside chunks, at chunk starts and at a segment start."""
    starts = [[8, 12, 20], [16, 28, 28]] if rule == "titans" else [[3, 12, 18], [10, 11, 28]]
    position = np.arange(tokens)
    return jnp.asarray(sum(position[None] >= np.array(starts)[:, i, None] for i in range(3)), jnp.int32)


@functools.cache
def forward(rule, init, implementation, chunk=CHUNK):
    """Return a jitted map from arguments and masks to outputs."""

    def outputs(arguments, masks):
        reads, states, final = chunk_memory(
            **arguments,
            **masks,
            rule=rule,
            segment_length=SEGMENT,
            segment_init=init,
            chunk_length=chunk,
            implementation=implementation,
        )
        if "lengths" in masks:  # reads past the end mean nothing
            written = jnp.arange(reads.shape[1], dtype=jnp.int32)[None] < masks["lengths"][:, None]
            reads = jnp.where(written[..., None, None], reads, 0)
        return reads, states, final

    return jax.jit(outputs)


@functools.cache
def with_gradients(rule, init, implementation):
    """Return a jitted map from arguments and masks to outputs and the gradients of all of them together.

    Tests share its compiled form: they pass the same names, `NO_MASKS` if need be.
    """

    def run(arguments, masks):
        outputs = functools.partial(forward(rule, init, implementation), masks=masks)
        values, pull = jax.vjp(outputs, arguments)
        return values, pull(ragged(values))[0]

    return jax.jit(run)


NO_MASKS = {"document_ids": np.zeros((B, TOKENS), np.int32), "lengths": np.full((B,), TOKENS, np.int32)}


def ragged(value):
    """Return a cotangent for each output that gives every entry another weight."""
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size).reshape(x.shape)).astype(x.dtype), value)


def assert_close(actual, expected, tolerance, what):
    """Compare two trees leaf by leaf, relative to the largest entry of each expected leaf."""
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert np.isfinite(left).all(), f"{what}{jax.tree_util.keystr(path)} is not finite"
        error = np.abs(left - right).max() / max(np.abs(right).max(), 1e-30)
        assert error <= tolerance, (
            f"{what}{jax.tree_util.keystr(path)} is off by {error:.1e}: a rule is not the reference's"
        )


def compare(rule, init, arguments, masks, implementation="xla"):
    """Hold values and gradients to those of the reference."""
    values, gradients = with_gradients(rule, init, implementation)(arguments, masks)
    expected, expected_gradients = with_gradients(rule, init, "reference")(arguments, masks)
    assert_close(values, expected, 1e-9, "value")
    assert_close(gradients, expected_gradients, 1e-7, "gradient")


def plain(rule, arguments, ids, length, row):
    """Return the states [T, H, K, V] after each token of a row of a checkpoint memory, by a NumPy loop."""
    q, k, v = (np.asarray(arguments[name][row]) for name in "qkv")
    retention, step, before, momentum = (
        np.asarray(arguments[name][row]) if name in arguments else np.full(q.shape[:2], default)
        for name, default in (("retention", 1), ("step", 1), ("previous_step", 0), ("momentum", 0))
    )
    start = np.asarray(arguments["initial_state"])
    states = np.zeros((q.shape[0], H, K, V))
    for h in range(H):
        memory, surprise, previous = start[h], np.zeros((K, V)), np.zeros((K, V))
        for t in range(length):
            if t and ids[row, t] != ids[row, t - 1]:
                memory, surprise, previous = start[h], np.zeros((K, V)), np.zeros((K, V))
            if t % CHUNK == 0:
                anchor = memory
            pair = np.outer(k[t, h], v[t, h])
            a, eta = retention[t, h], step[t, h]
            if rule == "titans":
                gradient = np.outer(k[t, h], k[t, h] @ anchor - v[t, h])
                surprise = momentum[t, h] * surprise - eta * gradient
                memory = a * memory + surprise
            elif rule == "delta":
                memory = a * (memory - eta * np.outer(k[t, h], k[t, h] @ memory)) + eta * pair
            else:
                memory = a * memory + before[t, h] * previous + eta * pair
            previous = pair
            states[t, h] = memory
        states[length:, h] = memory
    return states


@pytest.mark.parametrize("rule", RULES)
def test_reference_is_the_recurrence(x64, rule):
    arguments, ids, lengths = make(rule), documents(rule), jnp.array([TOKENS, 15], jnp.int32)
    masks = {"document_ids": ids, "lengths": lengths}
    (reads, states, final), _ = with_gradients(rule, "checkpoint", "reference")(arguments, masks)
    for row, length in enumerate((TOKENS, 15)):
        expected = plain(rule, arguments, np.asarray(ids), length, row)
        read = np.einsum("thk,thkv->thv", np.asarray(arguments["q"][row]), expected)
        np.testing.assert_allclose(reads[row, :length], read[:length], atol=1e-12)
        np.testing.assert_allclose(states[row], expected[[11, 23, 28]], atol=1e-12)
        np.testing.assert_allclose(final.weights[row], expected[-1], atol=1e-12)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rule", RULES)
def test_chunks_equal_tokens_with_documents_and_lengths(x64, rule, init):
    arguments = make(rule)
    # Ends inside a chunk, at a segment's end, at the row's end, before the first token.
    for lengths in ([15, 24], [29, 0]):
        masks = {"document_ids": documents(rule), "lengths": jnp.array(lengths, jnp.int32)}
        compare(rule, init, arguments, masks)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rule", RULES)
def test_extreme_retention_and_zero_keys_stay_exact(x64, rule, init):
    arguments = make(rule)
    retention = np.random.default_rng(3).choice([1.0, 1e-30, 0.0, 0.9], size=(B, TOKENS, H))
    arguments["retention"] = jnp.asarray(retention)
    arguments["k"] = arguments["k"].at[:, 5:9].set(0.0)
    masks = {"document_ids": documents(rule), "lengths": jnp.array([29, 21], jnp.int32)}
    compare(rule, init, arguments, masks)


@pytest.fixture
def two_segments_at_once(monkeypatch):
    """Pieces of the GPU's form so short that a row has two, the second filled up with nothing."""
    monkeypatch.setattr(gpu, "_CHUNKS", 2 * SEGMENT // CHUNK)


@pytest.mark.usefixtures("two_segments_at_once")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rule", GPU_RULES)
def test_segments_side_by_side_equal_tokens_with_documents_and_lengths(x64, rule, init):
    arguments = make(rule)
    for lengths in ([15, 24], [29, 0]):
        masks = {"document_ids": documents(rule), "lengths": jnp.array(lengths, jnp.int32)}
        compare(rule, init, arguments, masks, "gpu")
    arguments["retention"] = arguments["retention"].at[:, 3:9].set(1e-30).at[:, 13].set(0.0)
    compare(rule, init, arguments, masks, "gpu")


@pytest.mark.usefixtures("two_segments_at_once")
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_segments_side_by_side_without_coefficients_and_in_single_precision(rule):
    for tokens in (CHUNK - 1, 2 * SEGMENT + 1):
        arguments = make(rule, tokens, coefficients=False, dtype=np.float32)
        expected = forward(rule, "checkpoint", "reference")(arguments, {})
        assert_close(forward(rule, "checkpoint", "gpu")(arguments, {}), expected, 1e-5, f"{tokens} tokens:")


@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_tokens_without_coefficients(x64, rule):
    compare(rule, "checkpoint", make(rule, SEGMENT + 1, coefficients=False), {})
    for tokens in (1, CHUNK - 1):
        arguments = make(rule, tokens, coefficients=False)
        expected = forward(rule, "checkpoint", "reference")(arguments, {})
        assert_close(forward(rule, "checkpoint", "xla")(arguments, {}), expected, 1e-9, f"{tokens} tokens:")


@pytest.mark.parametrize("rule", RULES)
def test_independent_segments_are_runs_of_their_own(x64, rule):
    arguments = make(rule)
    (_, states, _), _ = with_gradients(rule, "independent", "xla")(arguments, NO_MASKS)
    second = {
        name: value if name == "initial_state" else jnp.roll(value, -SEGMENT, axis=1)
        for name, value in arguments.items()
    }
    masks = NO_MASKS | {"lengths": np.full((B,), SEGMENT, np.int32)}
    (_, _, final), _ = with_gradients(rule, "checkpoint", "xla")(second, masks)
    np.testing.assert_allclose(states[:, 1], final.weights, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_close(rule):
    exact = make(rule, dtype=np.float32)
    expected = forward(rule, "checkpoint", "reference")(exact, {})
    single = forward(rule, "checkpoint", "xla")(exact, {})
    assert_close(single, expected, 1e-5, "float32 value")

    rounded = {name: exact[name].astype(jnp.bfloat16) for name in "qkv"}
    restored = {name: value.astype(jnp.float32) for name, value in rounded.items()}
    expected, expected_states, _ = forward(rule, "checkpoint", "reference")(exact | restored, {})
    reads, states, final = forward(rule, "checkpoint", "xla")(exact | rounded, {})
    assert reads.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((states, final))} == {jnp.dtype(jnp.float32)}
    for actual, wanted in ((reads, expected), (states, expected_states)):
        difference = np.asarray(actual, np.float32) - np.asarray(wanted)
        ratio = np.sqrt(np.mean(difference**2) / np.mean(np.asarray(wanted) ** 2))
        assert ratio < 5e-3, f"bfloat16 is off by {ratio:.1e}: some product is not accumulated in float32"


@pytest.mark.parametrize("rule", RULES)
def test_steps_go_on_from_any_prefix(x64, rule):
    arguments = make(rule)
    (everything, _, _), _ = with_gradients(rule, "checkpoint", "xla")(arguments, NO_MASKS)
    # A prefix that ends inside a chunk and one that ends with a chunk, and none at all.
    lengths = np.array([15, 8], np.int32)
    (_, _, state), _ = with_gradients(rule, "checkpoint", "xla")(arguments, NO_MASKS | {"lengths": lengths})
    titans = rule == "titans"
    empty = initial_online_state(
        batch_weights(arguments["initial_state"], B, jnp.dtype(jnp.float64)),
        momentum=titans,
        anchor=titans,
        previous=rule == "swla",
    )
    scalars = {name: arguments[name] for name in COEFFICIENTS[rule]}

    @jax.jit
    def go_on(state, first):
        def step(state, offset):
            position = first + offset
            at = {
                name: jnp.take_along_axis(x, position.reshape(B, *[1] * (x.ndim - 1)), axis=1, mode="clip")[
                    :, 0
                ]
                for name, x in ({name: arguments[name] for name in "qkv"} | scalars).items()
            }
            read, state = memory_step(state, **at, rule=rule, chunk_start=position % CHUNK == 0)
            return state, read

        return jax.lax.scan(step, state, jnp.arange(TOKENS, dtype=jnp.int32))[1]

    for begin, first in ((state, lengths), (empty, np.zeros_like(lengths))):
        reads = go_on(begin, first)
        for row in range(B):
            rest = TOKENS - int(first[row])
            np.testing.assert_allclose(
                reads[:rest, row],
                everything[row, int(first[row]) :],
                atol=1e-12,
                err_msg="memory_step must equal chunk_memory token by token",
            )


@pytest.mark.parametrize("rule", ["linear", "swla", "delta"])
def test_chunk_length_does_not_change_the_result(x64, rule):
    arguments = make(rule)
    expected, _ = with_gradients(rule, "checkpoint", "xla")(arguments, NO_MASKS)
    for chunk in (1, 6):
        actual = forward(rule, "checkpoint", "xla", chunk)(arguments, {})
        assert_close(actual, expected, 1e-12, f"chunk {chunk} value")


def test_titans_without_momentum_and_retention_is_delta(x64):
    arguments = make("delta")
    arguments["retention"] = jnp.ones_like(arguments["retention"])
    delta, _ = with_gradients("delta", "checkpoint", "xla")(arguments, NO_MASKS)
    titans = forward("titans", "checkpoint", "xla", 1)(arguments, {})
    assert_close(titans[:2], delta[:2], 1e-12, "value")


def test_checkpoint_is_independent_plus_the_state_before(x64):
    arguments = make("linear")
    arguments["initial_state"] = jnp.zeros_like(arguments["initial_state"])
    (reads, states, _), _ = with_gradients("linear", "checkpoint", "xla")(arguments, NO_MASKS)
    (alone, _, _), _ = with_gradients("linear", "independent", "xla")(arguments, NO_MASKS)
    part = slice(SEGMENT, 2 * SEGMENT)
    decay = jnp.cumprod(arguments["retention"][:, part], axis=1)
    cached = jnp.einsum("bth,bthk,bhkv->bthv", decay, arguments["q"][:, part], states[:, 0])
    np.testing.assert_allclose(reads[:, part], alone[:, part] + cached, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "hebb"}, "choose one of linear, swla, delta, titans"),
        ({"segment_init": "warm"}, "choose one of checkpoint, independent"),
        ({"implementation": "cuda"}, "choose one of"),
        ({"chunk_length": 5}, "does not divide segment_length 12"),
        ({"momentum": jnp.ones((B, 5, H))}, "choose rule 'titans'"),
        ({"previous_step": jnp.ones((B, 5, H))}, "choose rule 'swla'"),
        ({"k": jnp.ones((B, 5, H, K + 1))}, r"k has shape \(2, 5, 2, 5\)"),
        ({"retention": jnp.ones((B, 5))}, "retention has shape"),
        ({"initial_state": jnp.ones((K, V))}, "initial_state has shape"),
        ({"initial_state": (jnp.ones((H, K, 8)), jnp.ones((H, 8, V)))}, "use deep_memory"),
        ({"q": jnp.ones((B, 5, K))}, "q has shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(change, message):
    settings = {
        "q": jnp.ones((B, 5, H, K)),
        "k": jnp.ones((B, 5, H, K)),
        "v": jnp.ones((B, 5, H, V)),
        "rule": "linear",
        "segment_length": SEGMENT,
        "chunk_length": CHUNK,
    }
    with pytest.raises(ValueError, match=message) as caught:
        chunk_memory(**(settings | change))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rule", "implementation"),
    [("linear", "xla"), ("swla", "xla"), ("swla", "reference"), ("titans", "xla"), ("titans", "reference")],
)
def test_a_run_that_goes_on_from_a_state_is_the_rest_of_the_whole_run(rule, implementation):
    arguments, ids = make(rule), documents(rule)
    settings = {"rule": rule, "segment_length": SEGMENT, "chunk_length": CHUNK}
    run = functools.partial(chunk_memory, **settings, implementation=implementation)

    def part(tokens: slice) -> dict:
        initial = arguments["initial_state"]
        cut = {name: x[:, tokens] for name, x in arguments.items() if name != "initial_state"}
        return {**cut, "initial_state": initial, "document_ids": ids[:, tokens]}

    # Both rows go on with a document, and one starts anew later.
    middle = 2 * SEGMENT if rule != "titans" else SEGMENT
    ids = jnp.where(jnp.arange(TOKENS)[None] == middle, ids[:, [middle - 1]], ids)
    ids = jax.lax.cummax(ids, axis=1)
    whole = run(**part(slice(None)))
    _, first_states, state = run(**part(slice(middle)))
    reads, states, final = run(**part(slice(middle, None)), start=state)
    assert_close(reads, whole[0][:, middle:], 1e-12, "the reads")
    assert_close(states, whole[1][:, first_states.shape[1] :], 1e-12, "the states")
    assert_close(final, whole[2], 1e-12, "the final state")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_init": "independent"}, "leave start out"),
        ({"implementation": "tpu"}, "goes on from no start"),
        ({"rule": "titans"}, "start's momentum is not one array"),
        ({"rule": "swla"}, "start has no previous token"),
    ],
)
def test_a_start_that_cannot_be_is_refused(changes, message):
    arguments = make("linear", tokens=SEGMENT, dtype=np.float32)
    settings = {"rule": "linear", "segment_length": SEGMENT, "chunk_length": CHUNK}
    _, _, state = chunk_memory(**arguments, **settings)
    with pytest.raises(ValueError, match=message):
        chunk_memory(**arguments, **{**settings, **changes}, start=state)

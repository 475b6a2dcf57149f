"""The reference against loops in NumPy, and against the identities of the mathematics (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax.facts import MEMORY_FACTS
from reference._numpy_loops import SEGMENT, in_numpy
from reference.mc_reference import memory_caching_reference

MEMORIES = tuple(MEMORY_FACTS)
B, T, H, K, V, R, E = 2, 14, 2, 3, 4, 5, 6
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of the time here goes to compiling tiny programs: compile them without optimization."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_inputs(seed=0, length=T, value_dim=V):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape)

    return {
        "q": normal(B, length, H, K),
        "k": normal(B, length, H, K) / 2,
        "v": normal(B, length, H, value_dim),
        "u": normal(B, length, H, R),
        "router_keys": normal(B, length, H, R),
        "online_logit": normal(B, length, H),
    }


def random_coefficients(memory, seed=1, length=T):
    rng = np.random.default_rng(seed)
    names = ["retention", "step"]
    names += {"swla": ["previous_step"], "titans": ["momentum"]}.get(memory, [])
    return {name: rng.uniform(0.2, 0.9, (B, length, H)) for name in names}


def random_matrix(seed=2):
    return np.random.default_rng(seed).standard_normal((H, K, V))


def random_mlp(seed=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((H, K, E)), rng.standard_normal((H, E, K)) / 2


def run(inputs, **settings):
    ids = np.zeros((B, inputs["q"].shape[1]), np.int32)
    defaults = {"segment_length": SEGMENT, "chunk_length": 2, "aggregation": "gated", "document_ids": ids}
    settings = defaults | settings
    arguments = {name: settings.pop(name) if name in settings else value for name, value in inputs.items()}
    arguments |= settings
    return jax.tree.map(np.asarray, memory_caching_reference(**jax.tree.map(as_array, arguments)))


def as_array(value):
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def assert_same(actual, expected, message):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, err_msg=message, **CLOSE),
        tuple(actual) if isinstance(actual, list) else actual,
        tuple(expected) if isinstance(expected, list) else expected,
    )


SETTINGS = [
    {"aggregation": "none"},
    {"aggregation": "residual"},
    {"aggregation": "gated", "segment_init": "independent"},
    {"aggregation": "gated", "blocks": 2},
    {"aggregation": "soup"},
    {"aggregation": "sparse", "top_k": 1},
    {"aggregation": "sparse", "top_k": 2, "segment_init": "independent"},
    {"aggregation": "average", "top_k": 2},
]


def assert_as_in_numpy(inputs, coefficients, documents, initial, **settings):
    expected = in_numpy(inputs, coefficients=coefficients, documents=documents, initial=initial, **settings)
    renamed = {"router_blocks" if name == "blocks" else name: value for name, value in settings.items()}
    actual = run(inputs, initial_state=initial, document_ids=documents, **coefficients, **renamed)[0]
    assert_same(actual, expected, f"the reference differs from loops in NumPy with {settings}")


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_matrix_memories_are_as_in_numpy_loops(settings):
    documents = np.array([[0] * 14, [3] * 2 + [5] * 8 + [6] * 4], np.int32)
    # One memory a setting: memory and aggregation know nothing of each other.
    memory = MEMORIES[SETTINGS.index(settings) % len(MEMORIES)]
    assert_as_in_numpy(
        random_inputs(), random_coefficients(memory), documents, random_matrix(), memory=memory, **settings
    )


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_is_as_in_numpy_loops(memory):
    documents = np.array([[0] * 14, [0] * 6 + [1] * 8], np.int32)
    inputs = random_inputs() | {"online_logit": None}
    assert_as_in_numpy(
        inputs, random_coefficients(memory), documents, random_matrix(), memory=memory, aggregation="gated"
    )


@pytest.mark.parametrize(
    ("memory", "aggregation", "segment_init", "branch"),
    [
        ("dla", "residual", "independent", "bounded"),
        ("dla", "gated", "checkpoint", "plain"),
        ("titans", "soup", "checkpoint", "bounded"),
        ("titans", "gated", "independent", "plain"),
    ],
)
def test_mlp_memories_are_as_in_numpy_loops(memory, aggregation, segment_init, branch):
    documents = np.array([[0] * 14, [0] * 6 + [1] * 8], np.int32)
    assert_as_in_numpy(
        random_inputs(value_dim=K),
        random_coefficients(memory),
        documents,
        random_mlp(),
        memory=memory,
        aggregation=aggregation,
        segment_init=segment_init,
        branch=branch,
    )


@pytest.mark.parametrize(
    ("memory", "segment_init"), [("titans", "checkpoint"), ("linear", "independent"), ("swla", "independent")]
)
def test_logarithmic_segmentation_is_as_in_numpy_loops(memory, segment_init):
    documents = np.array([[0] * 17, [0] * 3 + [1] * 14], np.int32)
    assert_as_in_numpy(
        random_inputs(length=17),
        random_coefficients(memory, length=17),
        documents,
        random_matrix(),
        memory=memory,
        aggregation="gated",
        segmentation="logarithmic",
        segment_init=segment_init,
        segment_length=2,
    )


def test_linear_gated_of_three_tokens_worked_out_by_hand():
    # Segment length 1, every vector has one number: M_1 = 2, M_2 = 2 + 3 = 5, M_3 = 2 + 3 + 4 = 9.
    column = jnp.ones((1, 3, 1, 1))
    v = jnp.array([2.0, 3.0, 4.0])[None, :, None, None]
    router_keys = jnp.log(jnp.array([1.0, 2.0, 7.0]))[None, :, None, None]
    y, states, pooled = memory_caching_reference(
        column,
        column,
        v,
        column,
        memory="linear",
        aggregation="gated",
        segment_length=1,
        router_keys=router_keys,
        online_logit=jnp.zeros((1, 3, 1)),
    )
    # Gates of token 3 are 1 : 2 : 1 (the online logit is 0), of token 2 they are 1 : 1.
    np.testing.assert_allclose(y[0, :, 0, 0], [2, (2 + 5) / 2, (2 + 2 * 5 + 9) / 4], **CLOSE)
    np.testing.assert_allclose(states[0, :, 0, 0, 0], [2, 5, 9], **CLOSE)
    np.testing.assert_allclose(pooled, router_keys, **CLOSE)


def test_sparse_ties_go_to_the_older_segment():
    inputs = random_inputs() | {"router_keys": np.zeros((B, T, H, R))}  # all scores are 0
    sparse = run(inputs, memory="linear", aggregation="sparse", top_k=1, segment_init="independent")
    oldest_alone = sparse[1][:, 0]
    gates = np.exp(np.stack([inputs["online_logit"], 0 * inputs["online_logit"]]))
    gates /= gates.sum(axis=0)
    online = run(inputs, memory="linear", aggregation="none", segment_init="independent")[0]
    expected = gates[0][..., None] * online + gates[1][..., None] * np.einsum(
        "bthk,bhkv->bthv", inputs["q"], oldest_alone
    )
    assert_same(sparse[0][:, SEGMENT:], expected[:, SEGMENT:], "with equal scores the oldest segment is read")


# Identities of the mathematics, section 4.


def test_with_one_segment_every_aggregation_is_the_base_recurrence():  # identity 1
    inputs = random_inputs(value_dim=K)
    settings = {"memory": "dla", "initial_state": random_mlp(), "segment_length": 16, "top_k": 2}
    expected = run(inputs, **settings, aggregation="none")[0]
    for aggregation in ("residual", "gated", "soup", "sparse", "average"):
        actual = run(inputs, **settings, aggregation=aggregation)[0]
        assert_same(actual, expected, f"{aggregation} with one segment is not the base recurrence")


def test_soup_is_gated_for_a_matrix_and_not_for_an_mlp():  # identity 2
    settings = {"memory": "titans"}
    matrix, mlp = random_inputs(), random_inputs(value_dim=K)
    gated = run(matrix, **settings, initial_state=random_matrix(), aggregation="gated")[0]
    soup = run(matrix, **settings, initial_state=random_matrix(), aggregation="soup")[0]
    assert_same(soup, gated, "soup differs from gated for matrix memories")
    gated = run(mlp, **settings, initial_state=random_mlp(), aggregation="gated")[0]
    soup = run(mlp, **settings, initial_state=random_mlp(), aggregation="soup")[0]
    assert np.abs(soup - gated)[:, SEGMENT:].max() > 1e-2, "soup of MLPs mixes weights, not outputs"


def test_sparse_over_all_segments_is_gated():  # identity 3
    settings = {"memory": "titans", "initial_state": random_mlp()}
    inputs = random_inputs(value_dim=K)
    gated = run(inputs, **settings, aggregation="gated")[0]
    sparse = run(inputs, **settings, aggregation="sparse", top_k=4)[0]
    assert_same(sparse, gated, "top_k 4 reads all there are")
    fewer = run(inputs, **settings, aggregation="sparse", top_k=1)[0]
    assert np.abs(fewer - gated)[:, 2 * SEGMENT :].max() > 1e-2, "top_k 1 reads fewer"


def test_residual_linear_reads_the_sum_of_states():  # identity 4
    inputs, settings = random_inputs(), {"memory": "linear"} | random_coefficients("linear")
    residual, states, _ = run(inputs, **settings, aggregation="residual")
    online = run(inputs, **settings, aggregation="none")[0]
    summed = np.cumsum(states, axis=1)  # [B, S, H, K, V]
    for t in range(SEGMENT, T):
        cached = np.einsum("bhk,bhkv->bhv", inputs["q"][:, t], summed[:, t // SEGMENT - 1])
        assert_same(residual[:, t], online[:, t] + cached, f"token {t} does not read the sum of states")


def test_memories_that_coincide():  # identity 5
    inputs, coefficients = random_inputs(), random_coefficients("linear")
    settings = {"initial_state": random_matrix(), "aggregation": "none"}
    linear = run(inputs, memory="linear", **settings, **coefficients)
    assert_same(run(inputs, memory="dla", **settings, **coefficients), linear, "dla on a matrix is linear")
    swla = run(inputs, memory="swla", **settings, **coefficients)
    assert_same(swla, linear, "swla without previous_step is linear")
    step = {"step": coefficients["step"]}
    titans = run(inputs, memory="titans", chunk_length=1, **settings, **step)
    assert_same(titans, run(inputs, memory="delta", **settings, **step), "titans of chunk 1 is delta")


def test_checkpoint_linear_is_independent_linear_and_one_cached_term():  # identity 7
    inputs, settings = random_inputs(), {"memory": "linear", "aggregation": "none"}
    coefficients = random_coefficients("linear")
    checkpoint, states, _ = run(inputs, **settings, **coefficients)
    independent = run(inputs, **settings, **coefficients, segment_init="independent")[0]
    a = coefficients["retention"]
    for t in range(SEGMENT, T):
        start = t // SEGMENT * SEGMENT
        decay = a[:, start : t + 1].prod(axis=1)[..., None]
        term = np.einsum("bhk,bhkv->bhv", inputs["q"][:, t], states[:, t // SEGMENT - 1])
        assert_same(checkpoint[:, t], independent[:, t] + decay * term, f"token {t}")


KINDS = [  # segments of 2 tokens, so that there are many
    {"memory": "swla", "initial_state": random_matrix(), "segment_init": "independent"},
    {"memory": "linear", "segmentation": "logarithmic", "segment_init": "independent"},
    {"memory": "delta", "aggregation": "sparse", "top_k": 1, "router_blocks": 2},
    {"memory": "delta", "initial_state": random_matrix(), "segmentation": "logarithmic"},
    {"memory": "titans", "initial_state": random_mlp(), "aggregation": "soup"},
    {"memory": "dla", "initial_state": random_mlp(), "aggregation": "average", "top_k": 1},
]
every_kind = pytest.mark.parametrize(
    "settings", KINDS, ids=lambda s: f"{s['memory']}-{s.get('aggregation', 'gated')}"
)


def inputs_of(settings, seed=0):
    mlp = isinstance(settings.get("initial_state"), tuple)
    inputs = random_inputs(seed, value_dim=K if mlp else V)
    if settings["memory"] == "swla":  # one kind has the running mean as its online logit
        del inputs["online_logit"]
    return inputs | random_coefficients(settings["memory"], seed + 1)


def replaced_where(where, inputs, others):
    """The tokens of `others` at the positions `where` [T], elsewhere those of `inputs`."""
    columns = {name: where.reshape(1, T, *[1] * (x.ndim - 2)) for name, x in inputs.items()}
    return {name: np.where(columns[name], others[name], x) for name, x in inputs.items()}


@every_kind
def test_documents_packed_at_segment_boundaries_are_as_each_alone(settings):  # identity 9
    inputs, cut = inputs_of(settings), 6
    document_ids = np.broadcast_to(np.where(np.arange(T) < cut, 3, 7).astype(np.int32), (B, T))
    packed = run(inputs, **settings, segment_length=2, document_ids=document_ids)[0]
    # As the first of a row that is one document: what comes later changes nothing.
    alone = run(inputs, **settings, segment_length=2)[0]
    assert_same(packed[:, :cut], alone[:, :cut], "the first document differs from itself alone")
    moved = {name: np.roll(x, -cut, axis=1) for name, x in inputs.items()}
    alone = run(moved, **settings, segment_length=2)[0]
    assert_same(packed[:, cut:], alone[:, : T - cut], "the second document differs from itself alone")


@every_kind
def test_documents_never_see_each_other(settings):  # identity 9
    inputs, position = inputs_of(settings), np.arange(T)
    begin, end = (6, 10) if settings["memory"] in ("dla", "titans") else (5, 9)  # at chunk starts, or inside
    document = np.where(position < begin, 0, np.where(position < end, 1, 2)).astype(np.int32)
    mixed = replaced_where(document == 1, inputs, inputs_of(settings, seed=9))
    document_ids = np.broadcast_to(document, (B, T))
    before = run(inputs, **settings, segment_length=2, document_ids=document_ids)[0]
    after = run(mixed, **settings, segment_length=2, document_ids=document_ids)[0]
    others = document != 1
    np.testing.assert_array_equal(after[:, others], before[:, others], err_msg="a document saw another")
    assert (np.abs(after - before)[:, ~others] > 0).all(), "the document that was changed is as before"


@every_kind
def test_later_tokens_change_nothing(settings):  # identity 10
    inputs, t = inputs_of(settings), 8  # the first of a segment's tokens
    mixed = replaced_where(np.arange(T) > t, inputs, inputs_of(settings, seed=9))
    before = run(inputs, **settings, segment_length=2)[0]
    after = run(mixed, **settings, segment_length=2)[0]
    np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1], err_msg="a token saw later ones")


@pytest.mark.parametrize("settings", [KINDS[i] for i in (0, 2, 4, 5)], ids=lambda s: s["memory"])
def test_gradients_are_finite_differences(settings):
    arrays = jax.tree.map(as_array, inputs_of(settings))
    # Small, so that the finite differences are exact enough.
    arrays = {name: x / 2 if name in ("k", "v", "router_keys") else x for name, x in arrays.items()}
    if settings.get("initial_state") is not None:
        arrays["initial_state"] = jax.tree.map(as_array, settings["initial_state"])
    static = {"segment_length": 2, "chunk_length": 2, "aggregation": "gated"}
    static |= {name: value for name, value in settings.items() if name not in arrays}
    document_ids = jnp.asarray([[0] * 6 + [1] * 8] * B, jnp.int32)

    def loss(arrays):
        y, states, pooled = memory_caching_reference(**arrays, **static, document_ids=document_ids)
        return sum(jnp.mean(x**2) for x in (y, *jax.tree.leaves(states), pooled))

    # One compilation for both: that of `loss` alone is saved.
    value_and_gradients = jax.jit(jax.value_and_grad(loss))
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), arrays)
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), value_and_gradients(arrays)[1], direction)
    size = 1e-6
    ahead, behind = (
        value_and_gradients(jax.tree.map(lambda x, d, by=by: x + by * d, arrays, direction))[0]
        for by in (size, -size)
    )
    slope = float(ahead - behind) / (2 * size)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory": "dense"}, "memory is 'dense'"),
        ({"aggregation": "sparse"}, "give top_k"),
        ({"router_blocks": 3}, "does not divide segment_length"),
        ({"memory": "linear", "initial_state": random_mlp()}, "is a matrix"),
        ({"memory": "delta", "segmentation": "logarithmic", "segment_init": "independent"}, "do not merge"),
    ],
)
def test_what_cannot_be_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(random_inputs(), **{"memory": "linear"} | wrong)

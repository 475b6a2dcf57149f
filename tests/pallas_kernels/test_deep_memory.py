import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _state
from pallas_kernels.deep_memory import deep_memory, deep_memory_step

pytestmark = pytest.mark.xdist_group("deep_memory")  # one worker: they share what is compiled

# B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, C chunk, L segment.
B, T, H, K, E, C, L = 2, 21, 2, 4, 6, 4, 8
LENGTHS = (21, 10)
DOCUMENTS = [[0] * 4 + [1] * 8 + [2] * 9, [0] * 16 + [1] * 5]
OBJECTIVES = ("dot", "l2")
INITS = ("checkpoint", "independent")


def make_arguments(objective, dtype=jnp.float32, *, seed=0, everything=False):
    """Arguments that are differentiated; `everything` adds what soup adds."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def unit(*shape):
        rows = rng.normal(size=shape)
        return jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype)

    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    arguments = {
        "q": unit(B, T, H, K),
        "k": unit(B, T, H, K),
        "v": normal(B, T, H, K),
        "retention": jax.nn.sigmoid(normal(B, T, H).astype(wide) + 2),
        "step": 0.2 * jax.nn.sigmoid(normal(B, T, H).astype(wide)),
        "initial_state": (0.5 * normal(H, K, E).astype(wide), 0.5 * normal(B, H, E, K).astype(wide)),
    }
    if objective == "l2":
        arguments["momentum"] = jax.nn.sigmoid(normal(B, T, H).astype(wide))
    if everything:
        arguments["hidden_bias"] = normal(B, T, H, E)
        arguments["hidden_gate"] = jax.nn.sigmoid(normal(B, T, H).astype(wide))
    return arguments


def run(arguments, options, implementation):
    """Outputs, zero past the rows' ends, where they mean nothing."""
    outputs = deep_memory(
        **arguments, **options, segment_length=L, chunk_length=C, implementation=implementation
    )
    if options.get("lengths") is not None:
        valid = jnp.arange(T)[None] < options["lengths"][:, None]
        outputs = tuple(
            jnp.where(valid[..., None, None], x, 0) if isinstance(x, jax.Array) else x for x in outputs
        )
    return outputs


def loss(arguments, arrays, *, implementation, **names):
    """A different weight on every element of every output; the outputs ride along."""
    outputs = run(arguments, {**arrays, **names}, implementation)
    total = 0.0
    for number, leaf in enumerate(jax.tree.leaves(outputs)):
        leaf = leaf.astype(_state.state_dtype(leaf))
        weight = jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype) * 1.7 + number)
        total = total + jnp.sum(leaf * weight.reshape(leaf.shape)) / leaf.size**0.5
    return total, outputs


@functools.cache
def compiled(implementation, objective, segment_init, branch):
    function = functools.partial(
        loss, implementation=implementation, objective=objective, segment_init=segment_init, branch=branch
    )
    return jax.jit(jax.value_and_grad(function, has_aux=True))


def outputs_and_gradients(implementation, objective, segment_init, arguments, arrays, branch="bounded"):
    (_, outputs), gradients = compiled(implementation, objective, segment_init, branch)(arguments, arrays)
    return outputs, gradients


def relative_error(actual, expected):
    """Largest difference of any leaf, relative to that leaf's largest element."""
    errors = jax.tree.map(
        lambda a, e: (
            float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))))
            / (float(np.max(np.abs(np.asarray(e, np.float64)))) + 1e-300)
        ),
        actual,
        expected,
    )
    return max(jax.tree.leaves(errors))


def rms_ratio(actual, expected):
    """Largest over leaves of RMS(actual - expected) / RMS(expected)."""
    ratios = jax.tree.map(
        lambda a, e: float(
            np.linalg.norm(np.asarray(a, np.float64) - np.asarray(e, np.float64))
            / np.linalg.norm(np.asarray(e, np.float64))
        ),
        actual,
        expected,
    )
    return max(jax.tree.leaves(ratios))


# Soup, which leaves the branch to the caller, and its absence; each branch with each objective and start.
@pytest.mark.parametrize(
    ("objective", "segment_init", "branch", "everything"),
    [
        ("dot", "checkpoint", "bounded", False),
        ("dot", "independent", "bounded", True),
        ("l2", "independent", "bounded", False),
        ("l2", "checkpoint", "bounded", True),
        ("dot", "checkpoint", "plain", True),
        ("l2", "independent", "plain", False),
    ],
)
def test_xla_equals_the_gradient_of_the_loss_token_by_token(x64, objective, segment_init, branch, everything):
    arguments = make_arguments(objective, jnp.float64, everything=everything)
    arrays = {"lengths": jnp.array(LENGTHS), "document_ids": jnp.array(DOCUMENTS)}
    actual, expected = (
        outputs_and_gradients(name, objective, segment_init, arguments, arrays, branch)
        for name in ("xla", "reference")
    )
    assert relative_error(actual[0], expected[0]) < 1e-9, "values differ: compare _chunk.py with docs/math.md"
    assert relative_error(actual[1], expected[1]) < 1e-7, "gradients differ: check the vjps in _products.py"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_is_as_good_as_float32_can_be(objective):
    arguments = make_arguments(objective)
    actual, expected = (
        outputs_and_gradients(name, objective, "checkpoint", arguments, {}) for name in ("xla", "reference")
    )
    assert relative_error(actual, expected) < 1e-5, "something is rounded more often than needed"


def test_bfloat16_reads_are_close_and_writes_are_float32():
    arguments = make_arguments("l2", jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    actual = outputs_and_gradients("xla", "l2", "checkpoint", arguments, {})
    expected = outputs_and_gradients("reference", "l2", "checkpoint", wide, {})
    (branch, *states), (expected_branch, *expected_states) = actual[0], expected[0]
    assert branch.dtype == jnp.bfloat16
    assert rms_ratio(branch, expected_branch) < 5e-3, "reads: round each factor once, accumulate in float32"
    assert relative_error(states, expected_states) < 1e-5, "writes must be float32 throughout"
    assert rms_ratio(actual[1], expected[1]) < 1e-2, "gradients: round each factor once"


@pytest.mark.parametrize("retention", [1.0, 1e-30, 0.0])
@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_extreme_decays_have_exact_gradients(retention, momentum):
    arguments = make_arguments("l2")
    arguments["retention"] = jnp.full((B, T, H), retention, jnp.float32)
    arguments["momentum"] = jnp.full((B, T, H), momentum, jnp.float32)
    actual, expected = (
        outputs_and_gradients(name, "l2", "checkpoint", arguments, {}) for name in ("xla", "reference")
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(actual))
    assert relative_error(actual, expected) < 1e-4, "decays must not be divided, or taken logarithms of"


@pytest.mark.parametrize("segment_init", INITS)
def test_what_follows_a_row_s_end_is_finite_and_changes_nothing(segment_init):
    arguments = make_arguments("l2")
    lengths = jnp.array([0, 9])
    past = (jnp.arange(T)[None] >= lengths[:, None])[..., None]
    changed = {
        name: jnp.where(past.reshape(past.shape + (1,) * (x.ndim - 3)), 0.5 * x, x)
        for name, x in arguments.items()
        if name != "initial_state"
    }
    changed["initial_state"] = arguments["initial_state"]
    options = {"objective": "l2", "segment_init": segment_init, "lengths": lengths}
    function = jax.jit(functools.partial(deep_memory, **options, segment_length=L, chunk_length=C))
    (branch, *states), (other_branch, *other_states) = function(**arguments), function(**changed)
    assert bool(jnp.isfinite(branch).all())
    branch, other_branch = (jnp.where(past[..., None], 0, x) for x in (branch, other_branch))
    assert relative_error((branch, *states), (other_branch, *other_states)) == 0
    first_row = states[1].weights[0][0]
    assert bool((first_row == arguments["initial_state"][0]).all()), "an empty row keeps the initial weights"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_token_by_token_decoding_equals_the_parallel_form(x64, objective):
    arguments = make_arguments(objective, jnp.float64, everything=True)
    lengths = jnp.array([T, 12])
    parallel = functools.partial(deep_memory, objective=objective, segment_length=L, chunk_length=C)
    branch, states, final, hidden = jax.jit(parallel)(**arguments, lengths=lengths)
    initial = _state.batch_weights(arguments.pop("initial_state"), B, jnp.float64)
    state = _state.initial_online_state(initial, momentum=objective == "l2", anchor=True)
    step = jax.jit(functools.partial(deep_memory_step, objective=objective))
    for token in range(T):
        now = {name: x[:, token] for name, x in arguments.items()}
        now_branch, after, now_hidden = step(state, **now, chunk_start=jnp.full((B,), token % C == 0))
        live = token < lengths
        state = _state.select_rows(live, after, state)
        actual = [np.asarray(x)[np.asarray(live)] for x in (now_branch, now_hidden)]
        expected = [np.asarray(x)[np.asarray(live), token] for x in (branch, hidden)]
        assert relative_error(actual, expected) < 1e-9, f"reads differ at token {token}"
        if token % L == L - 1:
            ended = jax.tree.map(lambda x, segment=token // L: x[:, segment], states)
            assert relative_error(state.weights, ended) < 1e-9, f"states differ at token {token}"
    # Row 1 ends with a chunk, so that its next token begins one: there the anchor is the weights already.
    anchor = _state.select_rows(lengths % C == 0, state.weights, state.anchor)
    state = dataclasses.replace(state, anchor=anchor)
    assert relative_error(state, final) < 1e-9, "the final state is not the one to go on from"


def test_packed_documents_equal_each_alone(x64):
    arguments = make_arguments("l2", jnp.float64)
    start = 12
    ids = jnp.array([[0] * start + [1] * (T - start)] * B)
    options = {"objective": "l2", "chunk_length": C}
    whole = jax.jit(functools.partial(deep_memory, **options, segment_length=L))
    branch, states, _ = whole(**arguments, document_ids=ids)
    second = {name: x if name == "initial_state" else x[:, start:] for name, x in arguments.items()}
    alone, _, final = jax.jit(functools.partial(deep_memory, **options, segment_length=12))(**second)
    assert relative_error(branch[:, start:], alone) < 1e-9, "a document must begin from the initial weights"
    last = jax.tree.map(lambda x: x[:, -1], states)
    assert relative_error(last, final.weights) < 1e-9, "the last segment's state is the last document's"


def test_a_segment_of_many_blocks_with_the_exact_online_rule(x64):
    arguments = make_arguments("l2", jnp.float64)
    options = {"objective": "l2", "segment_length": 40, "chunk_length": 1}
    actual, expected = (
        jax.jit(functools.partial(deep_memory, **options, implementation=name))(**arguments)
        for name in ("xla", "reference")
    )
    assert relative_error(actual, expected) < 1e-9, "blocks of chunks must go on from one another"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bounded_memory_stays_finite_and_short_where_a_plain_one_does_not(objective):
    """Rows are texts, heads are gates: of every kind both, over many chunks whose keys hardly change."""
    tokens, dim, chunk = 65_536, 8, 64
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, tokens, dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    texts = [(k, v), (k, 0 * v), (k, k)]
    texts += [(np.resize(k[:n], k.shape), np.resize(v[:n], v.shape)) for n in (1, 2)]
    gates = [(0.1, 0.9, 0.99), (0.1, 1.0, 0.0), (1.0, 0.1, 0.0), (1.0, 0.9, 0.0), (1.0, 1.0, 0.99)]
    keys, values = (
        jnp.asarray(np.stack([pair[which] for pair in texts])[:, :, None], jnp.float32) for which in (0, 1)
    )
    shape = (len(texts), tokens, len(gates), dim)
    step, retention, momentum = (
        jnp.broadcast_to(jnp.array(column), shape[:3]) for column in zip(*gates, strict=True)
    )
    initial = rng.normal(size=(dim, 4 * dim)) / dim**0.5, rng.normal(size=(4 * dim, dim)) / dim
    arguments = {
        "q": jnp.broadcast_to(keys, shape),
        "k": jnp.broadcast_to(keys, shape),
        "v": jnp.broadcast_to(values, shape),
        "step": step,
        "retention": retention,
        "initial_state": tuple(jnp.asarray(np.stack([w] * len(gates)), jnp.float32) for w in initial),
    }
    if objective == "l2":
        arguments["momentum"] = momentum
    run = functools.partial(deep_memory, objective=objective, segment_length=512, chunk_length=chunk)
    reads, states, _ = jax.jit(run)(**arguments)
    assert all(np.isfinite(leaf).all() for leaf in (reads, *states))
    assert np.linalg.norm(reads, axis=-1).max() <= 1.001 * dim**0.5, "a branch is no longer than sqrt(V)"
    few = {name: x if name == "initial_state" else x[:, :1024] for name, x in arguments.items()}
    plain, _, _ = jax.jit(functools.partial(run, branch="plain"))(**few)
    assert not np.isfinite(plain).all(), "this no longer shows what the bound is for"


def largest_array(jaxpr):
    """Elements of the largest array that is computed anywhere in a jaxpr."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize("segment_length", [64, 1024], ids=["short segments", "one segment"])
def test_neither_pass_holds_a_state_a_chunk_let_alone_a_token(segment_length):
    tokens, dim, hidden, chunk = 1024, 32, 128, 8
    row, scalar = jnp.zeros((1, tokens, 1, dim)), jnp.zeros((1, tokens, 1))
    arguments = {
        **dict.fromkeys(("q", "k", "v"), row),
        **dict.fromkeys(("retention", "momentum", "step"), scalar),
        "initial_state": (jnp.zeros((1, dim, hidden)), jnp.zeros((1, hidden, dim))),
    }

    def total(arguments):
        branch, _, _ = deep_memory(
            **arguments, objective="l2", segment_length=segment_length, chunk_length=chunk
        )
        return jnp.sum(branch**2)

    largest = largest_array(jax.make_jaxpr(jax.grad(total))(arguments).jaxpr)
    states = tokens // chunk * dim * hidden
    assert largest <= states / 4, f"an array of {largest} elements, where {states} are a state a chunk"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "l1"}, "objective is 'l1'"),
        ({"branch": "l1"}, "branch is 'l1'; choose one of bounded, plain"),
        ({"objective": "dot"}, "momentum means nothing to objective 'dot'"),
        ({"previous_step": jnp.ones((B, T, H))}, "previous_step means nothing"),
        ({"chunk_length": 3}, "chunk_length 3 does not divide segment_length 8"),
        ({"segment_init": "both"}, "segment_init is 'both'"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ({"initial_state": None}, "initial_state is not a pair"),
        ({"initial_state": (jnp.ones((H, K, E)), jnp.ones((H, E + 1, K)))}, "w_out has shape"),
        ({"v": jnp.ones((B, T, H, K + 1))}, "v has shape"),
        ({"step": jnp.ones((B, T))}, "step has shape"),
        ({"hidden_gate": jnp.ones((B, T, H, 1))}, "hidden_gate has shape"),
    ],
)
def test_wrong_arguments_are_named_with_their_cure(changes, message):
    arguments = {**make_arguments("l2"), "objective": "l2", "segment_length": L, "chunk_length": C, **changes}
    with pytest.raises(ValueError, match=message) as error:
        deep_memory(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("objective", "implementation"), [("l2", "xla"), ("dot", "xla"), ("l2", "reference")]
)
def test_a_run_that_goes_on_from_a_state_is_the_rest_of_the_whole_run(objective, implementation):
    arguments = make_arguments(objective, jnp.float64)
    ids = jnp.array([[0] * 4 + [1] * 8 + [2] * 9, [0] * 21])
    options = {"objective": objective, "segment_length": L, "chunk_length": C}

    def part(tokens: slice, **more):
        cut = {name: x[:, tokens] for name, x in arguments.items() if name != "initial_state"}
        rest = {"initial_state": arguments["initial_state"], "document_ids": ids[:, tokens]}
        return deep_memory(**cut, **rest, **options, **more, implementation=implementation)

    whole = part(slice(None))
    *_, state = part(slice(L))
    got = part(slice(L, None), start=state)
    expected = (whole[0][:, L:], jax.tree.map(lambda x: x[:, 1:], whole[1]), whole[2])
    assert relative_error(got, expected) < 1e-12
    with pytest.raises(ValueError, match="leave start out"):
        part(slice(L, None), start=state, segment_init="independent")


def test_segments_of_one_chunk_are_read_on_cpus_as_operation_by_operation():
    """At sizes for which XLA calls YNNPACK: without `_xla_flags` reads are wrong, or NaN."""
    keys = jax.random.split(jax.random.key(0), 8)
    rows, heads, dim = (4, 512), 4, 16
    q, k, v = (jax.random.normal(key, (*rows, heads, dim)) for key in keys[:3])
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    retention, momentum, step = (jax.nn.sigmoid(jax.random.normal(key, (*rows, heads))) for key in keys[3:6])
    initial = (
        0.02 * jax.random.normal(keys[6], (heads, dim, 4 * dim)),
        0.02 * jax.random.normal(keys[7], (heads, 4 * dim, dim)),
    )

    def reads(q, k, v):
        return deep_memory(
            q,
            k,
            v,
            objective="l2",
            retention=retention,
            momentum=momentum,
            step=0.1 * step,
            segment_length=64,
            segment_init="independent",
            initial_state=initial,
            chunk_length=64,
            implementation="xla",
        )[0]

    with jax.disable_jit():
        expected = reads(q, k, v)
    np.testing.assert_allclose(jax.jit(reads)(q, k, v), expected, atol=1e-5)

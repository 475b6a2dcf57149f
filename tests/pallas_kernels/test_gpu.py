"""Every operation lowers for GPUs that are not here, with its gradient; what they get has few loops.

B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, N states.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from gpu_description import lower_for_gpu, on_gpu
from jax.extend.core import ClosedJaxpr, Jaxpr

import pallas_kernels as ops
from pallas_kernels._state import initial_online_state

B, T, H, K, E, N = 1, 24, 2, 8, 16, 3
SEGMENTS = {"segment_length": 8, "chunk_length": 4}


def _shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def _tokens(dtype=jnp.bfloat16):
    return _shape(B, T, H, K, dtype=dtype)


def _with_gradients(function):
    """Return a map to the results and the gradients of the sum of all of them."""

    def total(*arguments):
        results = function(*arguments)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(results)), results

    def run(*arguments):
        return jax.value_and_grad(total, tuple(range(len(arguments))), has_aux=True)(*arguments)

    return run


def _cases():
    chunked = (_tokens(), _tokens(), _tokens())
    for rule in ("linear", "swla", "delta", "titans"):
        yield f"chunk_memory, {rule}", functools.partial(ops.chunk_memory, rule=rule, **SEGMENTS), chunked

    def deep(q, k, v, initial):
        return ops.deep_memory(q, k, v, objective="l2", initial_state=initial, **SEGMENTS)

    yield "deep_memory", deep, (*chunked, (_shape(H, K, E), _shape(H, E, K)))
    matrices = _shape(B, N, H, K, K)
    mlps = _shape(B, N, H, K, E), _shape(B, N, H, E, K)
    for name, states in (("matrices", matrices), ("MLPs", mlps)):
        yield f"gated_state_read, {name}", ops.gated_state_read, (_tokens(), _shape(B, T, H, N), states)

        def routed(q, gates, states):
            return ops.routed_state_read(q, gates, jnp.zeros((B, T, H, 2), jnp.int32), states)

        yield f"routed_state_read, {name}", routed, (_tokens(), _shape(B, T, H, 2), states)

    def decode(q, k, v, states, gates, online_gate):
        return ops.decode_step(
            initial_online_state(jnp.zeros((B, H, K, K))),
            q,
            k,
            v,
            states,
            gates,
            jnp.zeros((B, H, 2), jnp.int32),
            online_gate=online_gate,
            slot=jnp.zeros((B,), jnp.int32),
            rule="linear",
        )

    token = _shape(B, H, K, dtype=jnp.bfloat16)
    yield "decode_step", decode, (token, token, token, matrices, _shape(B, H, 2), _shape(B, H))


@pytest.mark.parametrize(("function", "arguments"), [pytest.param(f, a, id=name) for name, f, a in _cases()])
def test_every_operation_lowers_for_gpus_with_its_gradient(function, arguments):
    assert "stablehlo" in lower_for_gpu(_with_gradients(function), *arguments)


def _programs(params):
    for value in jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, ClosedJaxpr | Jaxpr)):
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


def _steps_in_turn(jaxpr) -> int:
    """Iterations of loops that wait for each other, inner ones times outer ones; a loop of one is none."""
    steps = 0
    for equation in jaxpr.eqns:
        inner = sum(map(_steps_in_turn, _programs(equation.params)))
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        steps += length * max(inner, 1) if length > 1 else inner
    return steps


@pytest.mark.parametrize("init", ["checkpoint", "independent"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_row_of_64_chunks_has_no_loop_on_gpus(rule, init):
    tokens, coefficient = _shape(1, 4096, 1, 8), _shape(1, 4096, 1)
    # Independent segments are side by side anyhow, but the 4 chunks of each are not.
    elsewhere = 64 if init == "checkpoint" else 4

    def run(q, k, v, retention):
        return ops.chunk_memory(
            q, k, v, rule=rule, retention=retention, segment_length=256, chunk_length=64, segment_init=init
        )[:2]

    for function, times in ((run, 1), (_with_gradients(run), 3)):
        with on_gpu():
            assert _steps_in_turn(jax.make_jaxpr(function)(tokens, tokens, tokens, coefficient).jaxpr) == 0
        found = _steps_in_turn(jax.make_jaxpr(function)(tokens, tokens, tokens, coefficient).jaxpr)
        # Forward, then the same again and backward for the gradient.
        assert found == times * elsewhere, "the other platforms' loops have changed: see why"


def test_long_rows_have_a_loop_over_pieces_alone():
    tokens = _shape(1, 1 << 15, 1, 16)
    run = functools.partial(ops.chunk_memory, rule="linear", segment_length=256, chunk_length=64)
    with on_gpu():
        steps = _steps_in_turn(jax.make_jaxpr(run)(tokens, tokens, tokens).jaxpr)
    assert steps == (1 << 15) // 4096, "a piece of a row is 64 chunks"


def test_delta_stays_in_a_loop_where_rows_and_heads_keep_a_gpu_busy():
    tokens = _shape(8, 512, 16, 16)
    run = functools.partial(ops.chunk_memory, rule="delta", segment_length=64, chunk_length=32)
    with on_gpu():
        assert _steps_in_turn(jax.make_jaxpr(run)(tokens, tokens, tokens).jaxpr) == 16


def test_titans_by_the_name_of_the_gpus_form_is_refused_with_a_cure():
    tokens = jnp.ones((1, 4, 1, 4))
    with pytest.raises(ValueError, match="leave implementation out"):
        ops.chunk_memory(
            tokens, tokens, tokens, rule="titans", segment_length=4, chunk_length=4, implementation="gpu"
        )

"""Attention by the TPU's splash kernel against XLA's: interpreted, and compiled for absent TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax.parallel import attention
from mc_jax.parallel.attention import attend

BATCH, TOKENS, HEADS = 2, 256, 2


def arguments(dim: int):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (BATCH, TOKENS, HEADS, dim)
    ids = (jnp.arange(TOKENS)[None] >= jnp.array([[100], [256]])).astype(jnp.int32)
    return *(jax.random.normal(key, shape) for key in keys), ids


@pytest.mark.parametrize("window", [None, 50])
def test_the_kernel_agrees_with_xla_forward_and_backward(monkeypatch, window):
    q, k, v, bar, ids = arguments(64)

    def both():
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ids, window), q, k, v)
        return y, *pull(bar)

    expected = both()
    monkeypatch.setattr(attention, "on_tpu", lambda q: True)
    kernel = attention.splash.make_splash_mha_single_device
    interpreted = functools.partial(kernel, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", interpreted)
    found = both()
    for name, one, other in zip("yqkv", found, expected, strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < 1e-5, f"{name} is off by {error:.1e}: do both see the same tokens?"


@pytest.mark.parametrize("dim", [48, 64, 96, 128, 256])
def test_heads_of_the_recipes_compile_and_hold_no_square_of_logits(programs, dim):
    shape = jax.ShapeDtypeStruct((1, 4096, 2, dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def gradient(q, k, v, ids):
        return jax.grad(lambda *x: jnp.sum(attend(*x, ids, None).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    held = programs.compiled_for("v5e", gradient, shape, shape, shape, ids)["bytes"]["temp"]
    assert held < 4096 * 4096, f"{held} bytes are held: are the logits among them?"

"""The cross-entropy in chunks against optax on all logits: alone, on meshes, and what it holds and sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tpu_topology import four

from mc_jax.config import MeshConfig
from mc_jax.parallel import cross_entropy as module
from mc_jax.parallel import make_mesh, spec
from mc_jax.parallel.cross_entropy import cross_entropy

ROWS, LENGTH, DIM = 8, 7, 16


def arguments(vocabulary: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (ROWS, LENGTH, DIM), dtype)
    output_map = jax.random.normal(keys[1], (vocabulary, DIM))
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, vocabulary, jnp.int32)
    return x, output_map, targets, jax.random.normal(keys[3], (ROWS, LENGTH))


def on_all_logits(x, output_map, targets):
    logits = jnp.einsum("btd,vd->btv", x.astype(jnp.float32), output_map.astype(x.dtype).astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def losses_and_gradients(function, x, output_map, targets, weights):
    def run(x, output_map):
        losses, pull = jax.vjp(lambda x, w: function(x, w, targets), x, output_map)
        return losses, pull(weights)

    return jax.jit(run)(x, output_map)


def must_agree(found, expected, rtol):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("tokens", [1000, 16, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_of_any_length_give_the_loss_and_gradient_of_all_logits(monkeypatch, tokens, dtype):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * tokens)
    given = arguments(50, dtype)
    found = losses_and_gradients(cross_entropy, *given)
    rtol = 1e-6 if dtype == jnp.float32 else 1e-2
    must_agree(found, losses_and_gradients(on_all_logits, *given), rtol)


def test_large_logits_do_not_overflow():
    x, output_map, targets, weights = arguments(50)
    found = losses_and_gradients(cross_entropy, 100 * x, output_map, targets, weights)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


def test_a_token_without_weight_gives_no_gradient_even_where_it_is_not_finite():
    x, output_map, targets, weights = arguments(50)
    weights = weights.at[2].set(0)
    expected = losses_and_gradients(cross_entropy, x, output_map, targets, weights)[1]
    for wrong in (jnp.nan, jnp.inf):
        given = x.at[2, 3].set(wrong), output_map, targets.at[2, 4].set(50), weights
        losses, found = losses_and_gradients(cross_entropy, *given)
        must_agree(found, expected, 1e-6)
        np.testing.assert_array_equal(np.argwhere(np.isnan(losses)), [[2, 3], [2, 4]])


MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "replica 2, fsdp 4": MeshConfig(replica=2, fsdp=4),
    "replica 2, fsdp 2, tensor 2": MeshConfig(replica=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize("vocabulary", [50, 51])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_no_number(monkeypatch, mesh, vocabulary):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * 4)
    given = arguments(vocabulary)
    expected = losses_and_gradients(on_all_logits, *given)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        x, output_map, targets, weights = given
        words = "vocab" if vocabulary % 2 == 0 else None
        rows = functools.partial(jax.device_put, device=spec("batch"))
        laid = rows(x), jax.device_put(output_map, spec(words, "model")), rows(targets), rows(weights)
        found = jax.tree.map(np.asarray, losses_and_gradients(cross_entropy, *laid))
    must_agree(found, expected, 1e-6)


def lowered_for_tpus(sizes: MeshConfig, rows: int, tokens: int, vocabulary: int, dim: int):
    mesh = make_mesh(sizes, four("v5e"))
    with jax.set_mesh(mesh):

        def shape(dims, dtype, *names):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec(*names)))

        x = shape((rows, tokens, dim), jnp.bfloat16, "batch")
        output_map = shape((vocabulary, dim), jnp.float32, "vocab", "model")
        targets = shape((rows, tokens), jnp.int32, "batch")

        def loss(x, output_map, targets):
            return jnp.sum(cross_entropy(x, output_map, targets))

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, output_map, targets)


@pytest.mark.parametrize("sizes", [MeshConfig(), MeshConfig(tensor=2)], ids=["fsdp 4", "fsdp 2, tensor 2"])
def test_tpus_hold_a_chunk_of_logits_and_send_none(programs, sizes):
    rows, tokens, vocabulary, dim = 16, 4096, 32_768, 256
    lowered = lowered_for_tpus(sizes, rows, tokens, vocabulary, dim)

    def found():
        compiled = lowered.compile()
        gathers = [line for line in compiled.as_text().splitlines() if "all-gather" in line.partition("(")[0]]
        return {
            "temp": compiled.memory_analysis().temp_size_in_bytes,
            "gathers": [line.strip().partition(" all-gather")[0] for line in gathers],
        }

    facts = programs.compiled(lowered, found)
    logits = 4 * rows * tokens * vocabulary // 4
    held, gathers = facts["temp"], facts["gathers"]
    assert held < logits / 3, f"{held / 2**20:.0f} MiB beside {logits / 2**20:.0f} of all logits of a device"
    assert gathers, "the output map is divided among devices: they must gather it"
    for words in {vocabulary, vocabulary // sizes.tensor}:
        assert not [line for line in gathers if f",{words}]" in line], "logits are gathered"

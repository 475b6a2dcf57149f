"""Data that is not finite reaches what depends on it, and nothing else, earlier or in other documents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, MEMORIES, NAMES, SEGMENT, SLOW_BUT_ONE, arguments

from mc_jax.caching import Routing, Settings, decode, forward, memory_caching
from mc_jax.config import ModelConfig, document_alignment
from mc_jax.memories import Coefficients

LENGTH = 29
SPOILT = [("k", 13), ("v", 21), ("q", 5), ("router_keys", 2), ("retention", 22)]
"""Which argument of row 0, head 1 is not finite, and at which token."""


def core(memory, aggregation, segment_init):
    settings = {"memory": memory, "aggregation": aggregation, "segment_length": SEGMENT}
    settings |= {"chunk_length": CHUNK, "segment_init": segment_init, **AGGREGATIONS[aggregation]}

    @jax.jit
    def run(found, document_ids, weights):
        def loss(found):
            y = memory_caching(**found, document_ids=document_ids, **settings)[0]
            return jnp.sum(jnp.where(weights != 0, jnp.sin(y) * weights, 0)), y

        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(found)
        return y, gradients

    return run


@pytest.mark.parametrize(("memory", "mlp"), SLOW_BUT_ONE, ids=NAMES)
def test_a_token_that_is_not_finite_spoils_its_document_from_there_on_and_nothing_else(memory, mlp):
    turn = MEMORIES.index((memory, mlp))
    aggregation = ("gated", "residual", "sparse", "average", "soup", "gated")[turn]
    run = core(memory, aggregation, ("checkpoint", "independent")[turn % 2])
    found = arguments(memory, mlp, aggregation, length=LENGTH, documents=True, dtype=jnp.float32)
    ids = found.pop("document_ids")
    clean = run(found, ids, jnp.ones_like(found["v"]))[0]
    for name, token in SPOILT:
        if name not in found:
            continue
        for wrong in (jnp.nan, jnp.inf):
            given = found | {name: found[name].at[0, token, 1].set(wrong)}
            y, _ = run(given, ids, jnp.ones_like(found["v"]))
            bad = np.isnan(y).any(axis=-1)
            reached = np.asarray(ids[0] == ids[0, token]) & (np.arange(LENGTH) >= token)
            assert bad[0, token, 1], f"{name} hid what is wrong"
            assert not bad[1].any(), f"{name} went to another row"
            assert not bad[0, :, 0].any(), f"{name} went to another head"
            assert not bad[0, ~reached, 1].any(), f"{name} went to earlier tokens or another document"
            np.testing.assert_array_equal(y[~bad], clean[~bad])
            # A loss that leaves out what is spoilt has the gradient that it would have without it.
            _, gradients = run(given, ids, jnp.where(bad[..., None], 0.0, 1.0))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)), name


@pytest.mark.parametrize("segment_init", ["checkpoint", "independent"])
@pytest.mark.parametrize("aggregation", ["none", "average", "gated"])
def test_a_spoilt_segment_is_nan_where_it_is_read_in_parallel_as_in_decoding(aggregation, segment_init):
    found = arguments("linear", False, aggregation, length=LENGTH, dtype=jnp.float32)
    initial = found.pop("initial_state")
    found["v"] = found["v"].at[0, 3, 1].set(jnp.nan)
    settings = Settings(
        aggregation=aggregation,
        segment_length=SEGMENT,
        chunk_length=CHUNK,
        segment_init=segment_init,
        **({"top_k": 1} if aggregation == "average" else {}),
    )

    def at(tokens):
        got = jax.tree.map(lambda x: x[:, tokens], found)
        routing = None
        if "u" in got:
            routing = Routing(got["u"], got["router_keys"], got["online_logit"])
        return got["q"], got["k"], got["v"], routing, Coefficients(got["retention"], step=got["step"])

    whole = jax.jit(lambda: forward(*at(slice(None)), settings, initial_state=initial))()
    bad = np.isnan(whole.y).any(-1)
    reach = {"none": SEGMENT, "average": 2 * SEGMENT, "gated": LENGTH}[aggregation]
    expected = np.zeros_like(bad)
    expected[0, 3 : LENGTH if segment_init == "checkpoint" else reach, 1] = True
    np.testing.assert_array_equal(bad, expected)

    # From within the spoilt segment, and from past its end.
    step = jax.jit(lambda cache, token: decode(*jax.tree.map(lambda x: x[:, 0], at_token(token)), cache))

    def at_token(token):
        sliced = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=token, slice_size=1, axis=1)
        return jax.tree.map(sliced, at(slice(None)))

    for start in (6, 11):
        cache = jax.jit(
            lambda start: forward(*at(slice(0, start)), settings, initial_state=initial).cache,
            static_argnums=0,
        )(start)
        if aggregation != "none":
            cache = cache.with_storage(type(cache.storage)(max_cached=4))
        for token in range(start, LENGTH):
            y, cache = step(cache, token)
            np.testing.assert_allclose(y, whole.y[:, token], atol=1e-5)


@pytest.mark.parametrize(("memory", "mlp"), [("titans", False), ("dla", True)], ids=["titans", "dla-mlp"])
def test_documents_that_start_within_chunks_are_refused_and_nan_in_compiled_code(memory, mlp):
    found = arguments(memory, mlp, "gated", length=LENGTH, dtype=jnp.float32)
    settings = {"memory": memory, "segment_length": SEGMENT, "chunk_length": CHUNK}
    place = jnp.arange(LENGTH)
    starts = jnp.array([[10, 16], [12, LENGTH]])
    ids = jnp.sum(place[None, :, None] >= starts[:, None], axis=-1)
    message = "a document of row 0 starts at token 10, within a chunk of 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_caching(**found, document_ids=ids, **settings)
    y = jax.jit(lambda found, ids: memory_caching(**found, document_ids=ids, **settings)[0])(found, ids)
    expected = np.zeros((2, LENGTH), bool)
    expected[0, 10:16] = True
    np.testing.assert_array_equal(np.isnan(y).all((-2, -1)), expected)


@pytest.mark.parametrize(("memory", "mlp"), MEMORIES, ids=NAMES)
def test_training_pads_documents_for_every_memory_that_takes_none_within_a_chunk(memory, mlp):
    found = arguments(memory, mlp, "none", length=LENGTH, dtype=jnp.float32)
    ids = jnp.broadcast_to(jnp.arange(LENGTH) >= 10, (2, LENGTH)).astype(jnp.int32)
    settings = {"memory": memory, "aggregation": "none", "segment_length": SEGMENT, "chunk_length": CHUNK}
    try:
        memory_caching(**found, document_ids=ids, **settings)
        takes_any = True
    except ValueError:
        takes_any = False
    model = ModelConfig(memory=memory, memory_depth=2 if mlp else 1, chunk_length=CHUNK)
    alignment = document_alignment(model)
    assert alignment == (1 if takes_any else CHUNK), "the rows of a training are made by document_alignment"

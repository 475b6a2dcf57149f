"""A text's logits are the same however it is read: split, filled up, beside others, packed, kept and fetched.

Language models with a short convolution, in float64, to 1e-9. With every memory and every aggregation, texts
are read up to several places at once and then token by token, from a file in between. What depends on one of
the two alone (chunks, packing, places) is shown by CASES, which have each memory and each aggregation once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.caching import Storage
from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.config import ModelConfig, document_alignment
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.memories import MEMORIES
from mc_jax.nn import LanguageModel

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.xdist_group("invariance"),  # one worker: they share what is compiled
]
SEGMENT, LENGTH, ROWS, VOCABULARY = 4, 24, 8, 13
TINY = ModelConfig(num_layers=1, model_dim=8, num_heads=2, mlp_dim=2, segment_length=SEGMENT, chunk_length=2)
MLPS = {"dla": ("residual", "soup"), "titans": ("sparse", "soup")}


def config_of(memory: str, aggregation: str, **more) -> ModelConfig:
    """One model of the two; in turn segments go on and start anew, and some of what can be an MLP is one."""
    turn = list(MEMORIES).index(memory) + list(AGGREGATIONS).index(aggregation)
    settings: dict[str, Any] = {"memory": memory, "aggregation": aggregation}
    settings["segment_init"] = ("checkpoint", "independent")[turn % 2]
    if MEMORIES[memory].mlp is not None:
        settings["memory_depth"] = 2 if aggregation in MLPS.get(memory, ()) else 1
    if AGGREGATION_FACTS[aggregation].top_k == "always":
        settings["top_k"] = 2
    return dataclasses.replace(TINY, **settings | more)


ALL = {
    f"{memory}, {aggregation}": config_of(memory, aggregation)
    for memory in MEMORIES
    for aggregation in AGGREGATIONS
}
FORMS = {
    "groups of checkpoints": config_of(
        "delta", "gated", segmentation="logarithmic", segment_init="checkpoint"
    ),
    "no convolution, untied": config_of("linear", "residual", convolution_width=1, tie_embeddings=False),
    "plain branch": config_of("dla", "gated", memory_depth=2, memory_branch="plain"),
}
SCALED = ("delta, sparse", "dla, residual")
CASES = {
    name: dataclasses.replace(config, num_layers=2, cache_scale="learned" if name in SCALED else None)
    for name, config in {
        **{
            name: ALL[name]
            for name in ("linear, none", "swla, average", "delta, sparse", "dla, residual", "titans, soup")
        },
        "keys, running mean, blocks": config_of(
            "linear", "gated", router_keys="keys", online_logit="running_mean", router_blocks=2
        ),
        "merged groups, narrow router": config_of(
            "linear", "gated", segmentation="logarithmic", segment_init="independent", router_dim=3
        ),
    }.items()
}


class Programs(NamedTuple):
    """A model's, compiled once for all tests; each is given its tokens and caches."""

    whole: Callable[..., jax.Array]
    prefill: Callable[..., Any]
    begin: Callable[..., Any]
    extend: Callable[..., Any]
    step: Callable[..., Any]


@functools.cache
def programs(config: ModelConfig, storage: Storage = Storage()) -> Programs:  # noqa: B008 - frozen
    """With weights away from those with which training begins, where all memories are read alike."""
    model = LanguageModel(config, VOCABULARY, dtype=jnp.float64, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x, np.float64) + rng.normal(0, 0.2, x.shape)), state
    )

    def compiled(method: Callable) -> Callable:
        call = jax.jit(lambda state, *arguments: method(nnx.merge(graph, state), *arguments))
        return functools.partial(call, state)

    def extend(model: LanguageModel, tokens: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        x, caches = model.extend(tokens, caches)
        return jnp.einsum("btd,vd->btv", x, model.output_map), caches

    return Programs(
        whole=compiled(lambda model, tokens, ids: model(tokens, ids)),
        prefill=compiled(lambda model, *given: model.prefill(*given, 2 * LENGTH, storage)),
        begin=compiled(lambda model: model.begin(ROWS, 2 * LENGTH, storage)),
        extend=compiled(extend),
        step=compiled(LanguageModel.step),
    )


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, np.int32)


TEXTS = drawn(2, LENGTH)
OF_ROW = np.arange(ROWS) % 2  # neighbours read another text
# Splits of each text: within segments and chunks, at their ends; from the shortest to the whole.
SPLITS = np.array([1, 3, 4, 7, 11, 16, LENGTH, LENGTH], np.int32)


def read_up_to(reader: Programs, lengths: np.ndarray, filling: int = 1) -> tuple[np.ndarray, Any]:
    """Logits after the first `lengths` tokens of each row's text, and caches; others fill the rows up."""
    inside = np.arange(LENGTH)[None] < lengths[:, None]
    rows = np.where(inside, TEXTS[OF_ROW], drawn(ROWS, LENGTH, seed=filling))
    logits, caches = reader.prefill(rows, lengths)
    return np.asarray(logits), caches


def read_on(
    reader: Programs, caches: Any, lengths: np.ndarray, steps: int
) -> tuple[dict[tuple[int, int], np.ndarray], Any]:
    """Decode that many tokens a row: logits by row and tokens read, and the caches after them."""
    found = {}
    for done in range(steps):
        place = np.minimum(lengths + done, LENGTH - 1)  # a text that has ended says its last token again
        logits, caches = reader.step(TEXTS[OF_ROW, place], caches)
        found |= {(row, lengths[row] + done + 1): np.asarray(logits[row]) for row in range(ROWS)}
    return {key: value for key, value in found.items() if key[1] <= LENGTH}, caches


def kept_and_fetched(caches: Any, path) -> Any:
    """The caches from a file: their arrays by number, laid out as those of a new text are."""
    leaves, tree = jax.tree.flatten(caches)
    np.savez(path, *map(np.asarray, leaves))
    with np.load(path) as file:
        return jax.tree.unflatten(tree, [jnp.asarray(file[name]) for name in file.files])


def must_be_same(found, expected, told: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=told)


@pytest.mark.parametrize("name", ALL | FORMS | CASES)
def test_wherever_a_text_is_split_and_kept_between_its_logits_are_the_same(name, tmp_path):
    reader = programs((ALL | FORMS | CASES)[name])
    logits, caches = read_up_to(reader, SPLITS)
    # Rows that were read further at once tell what those must find that go on token by token.
    expected = {(text, SPLITS[row]): logits[row] for row, text in enumerate(OF_ROW)}
    found, caches = read_on(reader, caches, SPLITS, 5)
    later, _ = read_on(reader, kept_and_fetched(caches, tmp_path / "caches.npz"), SPLITS + 5, LENGTH - 6)
    compared = 0
    for (row, length), value in (found | later).items():
        if (OF_ROW[row], length) in expected:
            compared += 1
            told = f"row {row}, split at {SPLITS[row]}: other logits after {length} tokens"
            must_be_same(value, expected[OF_ROW[row], length], told)
    assert compared == 12, compared


@pytest.mark.parametrize("name", CASES)
def test_one_forward_pass_gives_the_logits_of_every_prefix_and_filling_does_not_count(name):
    reader = programs(CASES[name])
    whole = reader.whole(TEXTS[OF_ROW], np.zeros((ROWS, LENGTH), np.int32))
    for lengths, filling in ((SPLITS, 1), (SPLITS[::-1], 2), (np.roll(SPLITS, 3), 3)):
        logits, _ = read_up_to(reader, lengths, filling)
        must_be_same(logits, whole[np.arange(ROWS), lengths - 1], f"prefixes of {lengths} tokens")


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_whole_segments_go_on_from_any_cache(name):
    reader, chunk = programs(CASES[name]), 2 * SEGMENT
    whole = reader.whole(TEXTS[OF_ROW], np.zeros((ROWS, LENGTH), np.int32))
    nothing = np.zeros(ROWS, np.int32)
    some = np.array([4, 8, 12, 4, 12, 8, 8, 4], np.int32)
    at_once = read_up_to(reader, some)[1]
    decoded = read_on(reader, read_up_to(reader, some - 1)[1], some - 1, 1)[1]
    for start, caches in ((nothing, reader.begin()), (some, at_once), (some, decoded)):
        places = start[:, None] + np.arange(chunk)
        logits, caches = reader.extend(TEXTS[OF_ROW[:, None], places], caches)
        must_be_same(logits, whole[np.arange(ROWS)[:, None], places], f"a chunk after {start} tokens")
        for (row, length), value in read_on(reader, caches, start + chunk, 4)[0].items():
            must_be_same(value, whole[row, length - 1], f"row {row}, {length} tokens: after a chunk")


@pytest.mark.parametrize("name", CASES)
def test_packed_and_padded_on_both_sides_a_text_reads_as_alone(name):
    reader, align = programs(CASES[name]), document_alignment(CASES[name])
    length = 2 * SEGMENT + 3
    alone = reader.whole(TEXTS[OF_ROW], np.zeros((ROWS, LENGTH), np.int32))
    rows, ids = drawn(ROWS, LENGTH, seed=4), np.zeros((ROWS, LENGTH), np.int32)
    first = np.arange(ROWS) // 2 % 3 * SEGMENT  # of segments that come before, as padding or as a document
    for row, start in enumerate(first):
        rows[row, start : start + length] = TEXTS[OF_ROW[row], :length]
        ids[row, start:] = 1
        ids[row, start + length + -length % align :] = 2
    places = first[:, None] + np.arange(length)
    by_row = np.arange(ROWS)[:, None]
    packed = reader.whole(rows, ids)
    must_be_same(packed[by_row, places], alone[:, :length], "packed at a segment's start")
    # Wherever a document starts: what others say does not count, to the bit.
    ids = (np.arange(LENGTH)[None] >= 2 * SEGMENT + 2).astype(np.int32) + np.zeros((ROWS, 1), np.int32)
    one, other = (
        reader.whole(np.where(ids == 0, drawn(ROWS, LENGTH, seed=seed), TEXTS[OF_ROW]), ids)
        for seed in (5, 6)
    )
    np.testing.assert_array_equal(one[ids == 1], other[ids == 1])


def test_with_more_places_and_in_the_hosts_memory_logits_are_the_same():
    storage = Storage(max_cached=19, when_full="drop-oldest", place="host")
    config = CASES["delta, sparse"]
    expected, _ = read_on(programs(config), read_up_to(programs(config), SPLITS)[1], SPLITS, 12)
    elsewhere = programs(config, storage)
    found, _ = read_on(elsewhere, read_up_to(elsewhere, SPLITS)[1], SPLITS, 12)
    for (row, length), value in found.items():
        must_be_same(value, expected[row, length], f"row {row}, {length} tokens")


def test_a_saved_cache_is_laid_out_as_that_of_a_new_text():
    for name in ("swla, average", "delta, sparse"):
        reader = programs(CASES[name])
        _, caches = read_up_to(reader, SPLITS)
        new = reader.begin()
        assert jax.tree.structure(caches) == jax.tree.structure(new), name
        assert jax.tree.map(jnp.shape, caches) == jax.tree.map(jnp.shape, new), name


def test_a_chunk_that_would_go_on_within_a_segment_is_nan_and_no_neighbour_is():
    reader, lengths = programs(CASES["delta, sparse"]), np.array([4, 3] * 4, np.int32)
    logits, caches = reader.extend(TEXTS[OF_ROW, :8], read_up_to(reader, lengths)[1])
    np.testing.assert_array_equal(np.isnan(logits).any((1, 2)), lengths == 3)
    found, _ = read_on(reader, caches, lengths + 8, 1)
    assert [bool(np.isnan(value).any()) for value in found.values()] == list(lengths == 3)

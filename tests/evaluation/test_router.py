"""Where a text sends the router, by gates that are made by hand."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mc_jax.caching.aggregations import Gates
from mc_jax.config import Config, ModelConfig
from mc_jax.data.dataset import Dataset
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import memory_store
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.evaluation.needle import Span
from mc_jax.evaluation.router import inspect_router
from mc_jax.training.run import Run

LAYERS, HEADS, SEGMENT = 2, 2, 4
TEXT = "it rained. the key is 7. it rained all day"


class HandMade:
    """Reads, of all but one head, the latest segment most; layer 1's head 1 reads the segment `wanted`."""

    def __init__(self, wanted: int):
        self.wanted = wanted

    def read_gates(self, tokens):
        length = tokens.shape[1]
        segments = -(-length // SEGMENT)
        cached = np.zeros((LAYERS, 1, length, HEADS, segments), np.float32)
        for token in range(SEGMENT, length):
            own = token // SEGMENT
            cached[:, 0, token, :, :own] = 0.1 / own
            cached[:, 0, token, :, own - 1] += 0.5
            if self.wanted < own:
                cached[1, 0, token, 1, own - 1] -= 0.5
                cached[1, 0, token, 1, self.wanted] += 0.5
        return Gates(jnp.asarray(1 - cached.sum(axis=-1)), jnp.asarray(cached))


def _run(wanted=0, tokenizer=None) -> Run:
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    config = Config(model=ModelConfig(num_layers=LAYERS, segment_length=SEGMENT, chunk_length=SEGMENT))
    store = memory_store(tokenize([Document("a", TEXT)], tokenizer), tokenizer)
    dataset = Dataset(tokenizer=tokenizer, train=store, held_out=None)
    return Run(epath.Path("runs/a"), config, dataset, HandMade(wanted), 1)


def test_every_position_reads_segments_and_what_is_online_adds_up():
    found = inspect_router(_run(), TEXT)
    row = 1 + len(TEXT)
    assert found.gates.shape == (LAYERS, row, HEADS, -(-row // SEGMENT) + 1)
    np.testing.assert_allclose(found.gates.sum(axis=-1), 1, atol=1e-6)
    assert "".join(found.tokens) == TEXT
    assert found.layers == (1, 2)
    assert found.needle is None
    assert np.shape(json.loads(json.dumps(found.to_json()))["gates"]) == (LAYERS, row, found.gates.shape[-1])


def test_a_needle_is_hit_where_a_head_reads_its_segment_most():
    start = TEXT.index("7")
    segment = (start + 1) // SEGMENT  # the separator comes first
    found = inspect_router(_run(segment), TEXT, Span(start, start + 1), asked_tokens=3).needle
    assert found is not None
    assert found.segments == (segment,)
    assert found.asked == (len(TEXT) - 2, len(TEXT) + 1)
    np.testing.assert_array_equal(found.hit_rate, [[0, 0], [0, 1]])
    assert found.any_hit_rate == 1
    assert found.share[1, 1] > 0.5 > found.share[0, 0]
    missed = inspect_router(_run(0), TEXT, Span(start, start + 1)).needle
    assert missed is not None
    assert missed.any_hit_rate == 0


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("rained", "réglée – €")])
def test_a_needle_in_characters_is_the_same_in_tokens(text):
    tokenizer = train_bpe([TEXT * 3], 268)
    ids = tokenizer.encode(text)
    assert len(ids) < len(text.encode()), "some tokens are of several bytes"
    run = _run(tokenizer=tokenizer)
    start, stop = text.index("key"), text.index("7") + 1
    # Token by token: those that hold one of the needle's bytes.
    ends = [
        sum(len(tokenizer._token_bytes[token]) for token in ids[:place]) for place in range(1, 1 + len(ids))
    ]
    first_byte, stop_byte = len(text[:start].encode()), len(text[:stop].encode())
    held = [
        place
        for place, end in enumerate(ends)
        if end > first_byte and (ends[place - 1] if place else 0) < stop_byte
    ]
    by_characters = inspect_router(run, text, Span(start, stop)).needle
    by_tokens = inspect_router(run, text, Span(held[0], held[-1] + 1, "tokens")).needle
    assert by_characters is not None
    assert by_tokens is not None
    assert (
        by_characters.segments
        == by_tokens.segments
        == tuple(range((held[0] + 1) // SEGMENT, (held[-1] + 1) // SEGMENT + 1))
    )


def test_what_cannot_be_inspected_is_refused_in_a_sentence():
    run = _run()
    with pytest.raises(ValueError, match="text to inspect is empty"):
        inspect_router(run, "")
    with pytest.raises(ValueError, match="needle is characters 5 to 5 of a text of"):
        inspect_router(run, TEXT, Span(5, 5))
    with pytest.raises(ValueError, match="needle is tokens 5 to 99 of a text of"):
        inspect_router(run, TEXT, Span(5, 99, "tokens"))
    for asked in (0, 1, len(TEXT) + 1):
        with pytest.raises(ValueError, match="put more text between the two"):
            inspect_router(run, TEXT, Span(len(TEXT) - 1, len(TEXT)), asked_tokens=asked)
    for changes in ({"aggregation": "residual"}, {"layer_pattern": ("attention",)}):
        model = dataclasses.replace(run.config.model, **changes)
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
        with pytest.raises(ValueError, match="runs/a has no router to inspect"):
            inspect_router(other, TEXT)

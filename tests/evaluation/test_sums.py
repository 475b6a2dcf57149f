import json
import math

import numpy as np
import pytest
from untrained import run_of, store_of

from mc_jax.data.documents import Document, tokenize
from mc_jax.data.files import json_text
from mc_jax.data.store import memory_store
from mc_jax.data.targets import target_counts
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.evaluation.core import measure
from mc_jax.evaluation.modes import ByPosition, Windows
from mc_jax.evaluation.sums import Sums, difference, units_of

TEXT = "Zwölf Boxkämpfer jagen  Eva\nquer über\u00a0den 😀 Deich. "


def sums_of(nats, tokens, words=None, texts=("x" * 9, "y" * 9)) -> Sums:
    """Sums by hand: a row of numbers each, a unit each."""
    columns = [np.array(values)[:, None] for values in (nats, tokens, tokens, words or tokens)]
    units = units_of(store_of(texts))
    return Sums(nats=columns[0], tokens=columns[1], bytes=columns[2], words=columns[3], units=units)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe([TEXT * 20], 280)], ids=["bytes", "bpe"])
def test_every_byte_and_word_of_a_text_is_counted_once(tokenizer):
    texts = [TEXT, "one", " ", "two words "]
    store = memory_store(tokenize([Document("", text) for text in texts], tokenizer), tokenizer)
    for document, text in enumerate(texts):
        counts = target_counts(store, document, tokenizer)
        assert len(counts.bytes) == len(counts.words) == len(store.document(document)) + 1
        assert counts.bytes.sum() == store.text_bytes[document] == len(text.encode())
        assert counts.words.sum() == len(text.split())


def test_a_word_counts_where_it_begins():
    store = store_of(["to  be é b"])
    words = target_counts(store, 0, ByteTokenizer()).words
    # The two bytes of é are one word, and the separator at the end is none.
    assert words.tolist() == [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_perplexities_and_bits_by_hand():
    # Two documents: 3 and 5 tokens at 2 and 1 nats each are 11 nats; there are 4 words and 8 bytes.
    figures = sums_of([6.0, 5.0], [3, 5], [2, 2]).figures()
    assert figures["loss"].value == pytest.approx(11 / 8)
    assert figures["perplexity"].value == pytest.approx(math.exp(11 / 8))
    assert figures["bits_per_byte"].value == pytest.approx(11 / 8 / math.log(2))
    assert figures["word_perplexity"].value == pytest.approx(math.exp(11 / 4))
    # Residuals 6 - 3 * 11/8 and 5 - 5 * 11/8 are plus and minus 1.875; sqrt(2/1 * 2 * 1.875^2) / 8.
    assert figures["loss"].standard_error == pytest.approx(math.sqrt(2 * 2 * 1.875**2) / 8)
    assert figures["perplexity"].standard_error == pytest.approx(
        math.exp(11 / 8) * figures["loss"].standard_error
    )


def test_a_paired_difference_is_surer_than_two_results():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 100, 40)
    hard = rng.uniform(1, 3, 40) * tokens
    better = hard - 0.1 * tokens + rng.normal(0, 0.1, 40)
    texts = ["x"] * 40
    one, other = (sums_of(nats, tokens, texts=texts) for nats in (hard, better))
    found = difference(one, other)["loss"]
    assert found.value == pytest.approx(one.figures()["loss"].value - other.figures()["loss"].value)
    assert found.value == pytest.approx(0.1, abs=1e-3)
    assert found.standard_error < one.figures()["loss"].standard_error / 50
    with pytest.raises(ValueError, match="not of the same targets"):
        difference(one, sums_of(hard, tokens + 1, texts=texts))


def test_the_standard_error_is_the_spread_of_results_on_texts_drawn_anew():
    rng = np.random.default_rng(1)
    losses, errors = [], []
    for _ in range(300):
        tokens = rng.integers(20, 200, 40)
        loss = sums_of(tokens * rng.gamma(4.0, 0.5, 40), tokens, texts=["x"] * 40).figures()["loss"]
        losses.append(loss.value)
        errors.append(loss.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.1)


def test_units_are_documents_where_there_are_many_and_else_blocks():
    many = units_of(store_of(["some words"] * 30))
    assert many.block_length is None
    assert len(many) == 30
    few = units_of(store_of(["some words " * 200] * 29))
    assert few.block_length is not None
    assert 100 <= len(few) <= 130, "some hundred blocks"
    assert few.of(1, np.array([0])) == few.first[1], "a block holds one document"


def test_one_unit_has_no_standard_error():
    result = measure(run_of(("few words",)), store_of(("few words",)), Windows(length=16, stride=8))
    assert "loss_standard_error" not in result.figures()
    assert result.sums.over == "1 blocks of 16 tokens"


def test_a_result_tells_all_that_must_be_known_to_find_it_again():
    run, store = run_of(), store_of()
    found = json.loads(json_text(measure(run, store, ByPosition(length=16)).to_json()))
    assert (found["mode"], found["context_length"], found["stride"]) == ("by-position", 16, 16)
    assert found["hashes"] == {
        "tokenizer": ByteTokenizer().fingerprint,
        "text": store.content_hash(),
        "checkpoint": None,
    }
    assert found["step"] == run.step
    assert "a document is read from a separator on" in found["beginning"]
    assert sum(found["units"]["nats"]) == pytest.approx(found["nats"])
    assert [bucket["from"] for bucket in found["by_position"]] == [0, 1, 2, 4, 8]
    assert sum(bucket["tokens"] for bucket in found["by_position"]) == found["tokens"] == store.num_pairs
    assert found["words"] == sum(
        len(text.split()) for text in ("a short one", "a much longer one that needs several windows of "
                                       "context, step by step" * 2)
    )  # fmt: skip


def test_a_text_of_another_tokenizer_is_refused():
    tokenizer = train_bpe([TEXT * 20], 280)
    other = memory_store(tokenize([Document("", TEXT)], tokenizer), tokenizer)
    with pytest.raises(ValueError, match="tokenized by another tokenizer"):
        measure(run_of(), other, Windows(length=16, stride=8))

import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from mc_jax.data.tokenizer import (
    SEPARATOR_ID,
    BpeTokenizer,
    ByteTokenizer,
    cut_stream,
    cut_text,
    load_tokenizer,
    train_bpe,
)

TEXT = "The cat sat on the mat, and the other cat sat on the other mat; it's 1815!\n\n  She didn't.\n" * 20
BPE = train_bpe([TEXT], 290)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@TOKENIZERS
@hypothesis.given(text=UNICODE | st.text("the cat\n .") | st.just(TEXT) | st.just("<|endoftext|>\0\r\n é 😀"))
def test_every_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert SEPARATOR_ID not in ids
    assert ids.max(initial=0) < tokenizer.vocab_size


@TOKENIZERS
def test_a_batch_encodes_as_its_texts_do(tokenizer):
    texts = ["the cat", "", TEXT, "é"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@TOKENIZERS
def test_decoding_skips_separators_and_replaces_broken_utf8(tokenizer):
    assert tokenizer.decode([SEPARATOR_ID, ord("a"), SEPARATOR_ID, 0xC3, ord("b")]) == "a\ufffdb"


@TOKENIZERS
@pytest.mark.parametrize("token", [-1, 10_000])
def test_decoding_refuses_foreign_ids(tokenizer, token):
    with pytest.raises(ValueError, match="do not fit a vocabulary"):
        tokenizer.decode([token])


@TOKENIZERS
def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_bpe_cuts_text_as_the_reference_implementation_does():
    reference = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    reference.train_from_iterator([TEXT], vocab_size=289, min_frequency=2, show_progress=False)
    text = TEXT[:300] + " unseen words: naïve 东京 \t\n\n  end "
    expected = [reference.decode([token]) for token in reference.encode(text).ids]
    assert [BPE.decode([token]) for token in BPE.encode(text)] == expected


def test_vocabularies_of_bytes_and_bpe_are_nested():
    assert (ByteTokenizer().vocab_size, BPE.vocab_size) == (257, 290)
    assert [BPE.decode([token]) for token in range(32, 127)] == [chr(token) for token in range(32, 127)]
    assert all(len(BPE.decode([token])) > 1 for token in range(257, 290))


def test_two_merges_may_make_one_token():
    a, b, c, ab, bc = ord("a"), ord("b"), ord("c"), 257, 258
    tokenizer = BpeTokenizer([(a, b), (b, c), (ab, c), (a, bc)])
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode([259]) == "abc"


WORDS = st.lists(st.sampled_from(["the", " cat", " other", "mat", ".", " ", "\n", "\t", "é", "'s"])).map(
    "".join
)


@hypothesis.given(text=UNICODE | WORDS, length=st.integers(1, 20))
def test_pieces_encode_as_the_whole_does(text, length):
    pieces = list(cut_text(text, length))
    assert "".join(pieces) == text
    whole = BPE.encode(text)
    np.testing.assert_array_equal(np.concatenate([whole[:0], *map(BPE.encode, pieces)]), whole)


def test_long_text_is_cut_into_pieces():
    assert max(map(len, cut_text(TEXT, 100))) < 120


def test_training_is_deterministic_and_fingerprints_tell_tokenizers_apart():
    assert train_bpe([TEXT], 290).fingerprint == BPE.fingerprint
    assert len({BPE.fingerprint, train_bpe([TEXT], 289).fingerprint, ByteTokenizer().fingerprint}) == 3
    message = "prepared folders and saved runs would become unreadable; raise _VERSION and say so in the docs"
    assert ByteTokenizer().fingerprint.startswith("31cace17d173adf6"), message


@pytest.mark.parametrize(
    ("size", "message"), [(257, "258 or more"), (4096, r"set vocab_size to \d+ or less")]
)
def test_a_vocabulary_that_cannot_be_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe([TEXT], size)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        load_tokenizer(path)
    path.write_text('{"model": ')
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_tokenizer(path)
    path.write_text('{"model": {}}')
    with pytest.raises(ValueError, match="not a tokenizer of mc_jax"):
        load_tokenizer(path)
    BPE.save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"merges": values["merges"][:-1]}))
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(path)
    path.write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "text", ["x" * 40_000, "ACGT" * 9000, "東京" * 9000, "=" * 20_000 + " end", " " * 30_000]
)
def test_a_word_without_end_is_cut_and_comes_back_whole(text):
    assert max(map(len, cut_text(text))) <= 1 << 14
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["a1" * 20_000, "東京、大阪。" * 5000, "word\t" * 9000, "+/Ab9" * 9000, "그는 말했다\r\n" * 4000]
)
def test_ordinary_text_is_cut_where_no_token_changes(text):
    whole = BPE.library_model().encode(text, add_special_tokens=False).ids
    assert len(list(cut_text(text))) > 1
    np.testing.assert_array_equal(BPE.encode(text), whole)


@hypothesis.given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=9))
@hypothesis.settings(max_examples=20)
def test_a_text_in_chunks_is_cut_as_the_whole_is(sizes):
    for text in (TEXT * 30, "x" * 50_000, "word" * 9000 + "。" * 9000):
        edges = list(itertools.accumulate(itertools.islice(itertools.cycle(sizes), 99), initial=0))
        chunks = [text[start:stop] for start, stop in itertools.pairwise([*edges, max(edges[-1], len(text))])]
        assert list(cut_stream(chunks, 100)) == list(cut_text(text, 100))


def test_to_learn_from_a_word_without_end_takes_no_time_without_end():
    tokenizer = train_bpe(["x" * 300_000, TEXT], 270)
    assert tokenizer.decode(tokenizer.encode("xxx the cat")) == "xxx the cat"

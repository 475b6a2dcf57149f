"""The corpus "pairs": what is asked was told, what is scored is asked, and it is the same on every call."""

import hashlib
import random

import pytest

from experiments.recall import config
from mc_jax.data import pairs
from mc_jax.data.documents import tokenize
from mc_jax.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def corpus():
    return pairs.training_documents(), pairs.held_out_documents()


def lines_of(document):
    return [line.split(" ") for line in document.text.splitlines()]


def test_a_word_is_scored_where_its_name_was_told_of_before_and_nowhere_else(corpus):
    for document in (*corpus[0][:200], *corpus[1]):
        told, places, place = {}, [], 0
        for name, word in lines_of(document):
            if name in told:
                assert told[name] == word, f"{name} of {document.name} has two words"
                places.append((place + len(name), place + len(name) + 1 + len(word)))
            told[name] = word
            place += len(name) + len(word) + 2
        assert document.responses == tuple(places)


def test_the_corpus_is_the_same_on_every_machine(corpus):
    digests = [
        hashlib.sha256("\0".join(document.text for document in part).encode()).hexdigest() for part in corpus
    ]
    assert digests == [
        "192786822086799a63c27f05885d2e025abf6f52e0ea2bb3cda8518b0410e611",
        "ef48dbcf104edf4c5d7d1e865a8aa4899a6046ff1fd0c54c4c417e5c4c7a1af4",
    ], "runs on the old corpus would not go on: give the new one another name"


def test_no_held_out_document_was_learned(corpus):
    train, held_out = ({document.text for document in part} for part in corpus)
    assert len(held_out) == 64
    assert not train & held_out


def test_the_recipe_reads_a_word_in_one_token_and_a_document_in_one_row(corpus):
    data = config().data
    tokenizer = train_bpe((document.text for document in corpus[0]), data.vocab_size)
    split = [name for name in pairs.NAMES if len(tokenizer.encode(name)) > 1]
    split += [word for word in pairs.WORDS if len(tokenizer.encode(" " + word)) > 1]
    assert split == [], "choose another data.vocab_size for the recipe"
    sizes = {len(document.tokens) + 1 for document in tokenize(corpus[0][:500], tokenizer)}
    assert max(sizes) == data.context_length, "the longest documents no longer fill a row"


def test_names_are_told_of_once_and_words_may_be_the_same():
    drawn = pairs.draw_pairs(random.Random(0), len(pairs.NAMES))
    assert sorted(name for name, _ in drawn) == sorted(pairs.NAMES)
    assert {word for _, word in drawn} < set(pairs.WORDS)

import itertools
import json
import re

import numpy as np
import pytest

from mc_jax.data.documents import Document, TokenizedDocument, tokenize
from mc_jax.data.pipeline import training_batches
from mc_jax.data.store import memory_store, open_store, write_store
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.data.windows import evaluation_windows

TOKENIZER = ByteTokenizer()
DOCUMENTS = [Document("first", "abc"), Document("second\nline", "é"), Document("third", "xyz" * 50)]


@pytest.fixture
def written(tmp_path):
    write_store(tmp_path / "train", tokenize(DOCUMENTS, TOKENIZER), TOKENIZER)
    return tmp_path / "train"


def test_a_written_store_has_the_face_of_one_in_memory(written):
    on_disk = open_store(written, TOKENIZER)
    in_memory = memory_store(tokenize(DOCUMENTS, TOKENIZER), TOKENIZER)
    for store in (on_disk, in_memory):
        assert len(store) == 3
        assert (store.num_tokens, store.num_pairs, store.num_bytes) == (155, 158, 155)
        assert list(store.names) == [document.name for document in DOCUMENTS]
        assert (store.separator_id, store.vocab_size) == (256, 257)
        assert store.fingerprint == TOKENIZER.fingerprint
        assert store.tokens.dtype == np.uint16
        for index, document in enumerate(DOCUMENTS):
            assert store.document(index).dtype == np.int32
            assert TOKENIZER.decode(store.document(index)) == document.text


def test_any_slice_of_a_sequence_has_its_separators(written):
    store = open_store(written)
    whole = np.array([256, *b"abc", 256], np.int32)
    for start in range(6):
        for stop in range(start, 6):
            np.testing.assert_array_equal(store.sequence(0, start, stop), whole[start:stop])


def test_large_vocabularies_are_stored_in_32_bits(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 70_000

    document = TokenizedDocument("large", np.array([69_999], np.int32), 1)
    store = write_store(tmp_path / "large", [document], Large())
    assert store.tokens.dtype == np.uint32
    np.testing.assert_array_equal(store.document(0), [69_999])


def test_empty_documents_are_left_out():
    documents = [Document("empty", ""), *DOCUMENTS, Document("empty", "")]
    assert len(memory_store(tokenize(documents, TOKENIZER), TOKENIZER)) == 3


def test_a_store_without_text_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        memory_store([], TOKENIZER)
    with pytest.raises(ValueError, match="no text"):
        write_store(tmp_path / "train", [], TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_half_made(tmp_path):
    def interrupted():
        yield from tokenize(DOCUMENTS, TOKENIZER)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "train", interrupted(), TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(written):
    with pytest.raises(ValueError, match="not empty"):
        write_store(written, tokenize(DOCUMENTS, TOKENIZER), TOKENIZER)
    assert len(open_store(written)) == 3


def test_a_missing_store_is_named_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"no token store at .*manifest.json; write it again with mc-jax"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "text_bytes.npy", "names.txt"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_refused(written, name, damage):
    path = written / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} is missing or not as it was written"):
        open_store(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable token store"),
        ("[]", "not a token store"),
        ('{"kind": "token store", "version": 9}', "version 9"),
        ('{"kind": "token store", "version": 1}', "it has no fingerprint"),
    ],
)
def test_a_damaged_manifest_is_refused(written, content, message):
    (written / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_store(written)


def test_a_store_of_another_tokenizer_is_refused(written):
    with pytest.raises(ValueError, match="another tokenizer"):
        open_store(written, train_bpe(["the cat sat on the mat " * 9], 260))


def test_a_token_outside_the_vocabulary_ends_what_would_read_it_with_the_stores_name(tmp_path):
    written = tmp_path / "train"
    wrong = TokenizedDocument("wrong", np.array([97, 300, 98], np.int32), 3)
    store = write_store(written, [*tokenize(DOCUMENTS, TOKENIZER), wrong], TOKENIZER)
    message = f"{written}: document 3 has token 300, outside the vocabulary of 257"
    with pytest.raises(ValueError, match=re.escape(message)):
        list(itertools.islice(training_batches(store, context_length=16, batch_size=4, seed=0), 10))
    with pytest.raises(ValueError, match=re.escape(message)):
        list(evaluation_windows(store, context_length=16, stride=8, batch_size=2))


def test_a_store_of_another_vocabulary_than_its_tokenizers_is_refused(written):
    manifest = json.loads((written / "manifest.json").read_text())
    (written / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 300}))
    with pytest.raises(ValueError, match="of another tokenizer"):
        open_store(written, TOKENIZER)

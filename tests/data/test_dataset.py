import pytest

from mc_jax.config import DataConfig
from mc_jax.data import corpus as corpora
from mc_jax.data.corpus import load_corpus
from mc_jax.data.dataset import open_data
from mc_jax.data.prepare import prepare
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe


@pytest.fixture(scope="module")
def austen():
    return open_data(DataConfig(tokenizer="bpe", vocab_size=512))


def test_the_embedded_corpus_holds_out_a_whole_novel(austen):
    assert list(austen.held_out.names) == ["persuasion"]
    assert len(austen.train) == 5
    assert austen.train.num_bytes + austen.held_out.num_bytes == 4_025_023
    novel = load_corpus("austen").held_out[0]
    assert austen.tokenizer.decode(austen.held_out.document(0)) == novel.text
    assert austen.tokenizer.vocab_size == 512


def test_a_saved_tokenizer_is_used_and_not_made_again(austen, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    austen.tokenizer.save(path)
    monkeypatch.setattr("mc_jax.data.dataset.train_bpe", None)
    reopened = open_data(DataConfig(tokenizer="bpe", vocab_size=512), path)
    assert reopened.train.fingerprint == austen.train.fingerprint
    with pytest.raises(ValueError, match="a 'bpe' tokenizer of 512 ids, not what"):
        open_data(DataConfig(tokenizer="bytes"), path)
    with pytest.raises(ValueError, match="512 ids, not what"):
        open_data(DataConfig(tokenizer="bpe", vocab_size=600), path)


def test_opening_writes_nothing(tmp_path):
    open_data(DataConfig(tokenizer="bytes"), tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_corpus_needs_a_tokenizer():
    with pytest.raises(ValueError, match=r"data\.tokenizer is None; set it to"):
        open_data(DataConfig(tokenizer=None))


def test_a_changed_corpus_file_is_refused(monkeypatch):
    monkeypatch.setattr(corpora, "_AUSTEN_HELD_OUT", {"persuasion": "0" * 64})
    with pytest.raises(ValueError, match=r"persuasion.txt.gz does not have the SHA-256 .*; install"):
        load_corpus("austen")


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "novel.txt").write_text("the cat sat on the mat " * 9)
    (tmp_path / "other.txt").write_text("another text")
    prepare([tmp_path / "novel.txt"], tmp_path / "mine", tokenizer="bytes", held_out=[tmp_path / "other.txt"])
    return tmp_path / "mine"


def test_a_prepared_folder_brings_its_tokenizer(prepared):
    dataset = open_data(DataConfig(corpus=str(prepared), tokenizer=None))
    assert dataset.tokenizer.decode(dataset.held_out.document(0)) == "another text"
    dataset.tokenizer.save(prepared.parent / "tokenizer.json")
    open_data(DataConfig(corpus=str(prepared), tokenizer=None), prepared.parent / "tokenizer.json")


def test_a_tokenizer_beside_a_prepared_folder_is_refused(prepared):
    with pytest.raises(ValueError, match=r"data.tokenizer 'bytes' has no effect.*set data.tokenizer to None"):
        open_data(DataConfig(corpus=str(prepared)))
    with pytest.raises(ValueError, match=r"data\.vocab_size 300 has no effect"):
        open_data(DataConfig(corpus=str(prepared), tokenizer=None, vocab_size=300))


def test_a_folder_of_another_tokenizer_than_the_run_is_refused(prepared, tmp_path):
    train_bpe(["the cat sat on the mat " * 9], 260).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        open_data(DataConfig(corpus=str(prepared), tokenizer=None), tmp_path / "tokenizer.json")


def test_an_unknown_corpus_names_its_neighbours_and_the_cure(prepared):
    with pytest.raises(ValueError, match=r"'austin' is no .* did you mean austen\? .*mc-jax prepare"):
        open_data(DataConfig(corpus="austin"))
    with pytest.raises(ValueError, match=r"did you mean mine\?"):
        open_data(DataConfig(corpus=str(prepared.parent / "mime"), tokenizer=None))


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no prepared folder at .*; write the folder with mc-jax prepare"):
        open_data(DataConfig(corpus=str(tmp_path), tokenizer=None))


def test_a_prepared_folder_whose_parts_do_not_fit_is_refused(prepared):
    (prepared / "held_out").rename(prepared / "elsewhere")
    with pytest.raises(ValueError, match=r"no token store at .*held_out"):
        open_data(DataConfig(corpus=str(prepared), tokenizer=None))
    train_bpe(["the cat sat on the mat " * 9], 260).save(prepared / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer"):
        open_data(DataConfig(corpus=str(prepared), tokenizer=None))


def test_a_folder_without_held_out_text_says_so_by_none(tmp_path):
    (tmp_path / "novel.txt").write_text("text")
    assert prepare([tmp_path / "novel.txt"], tmp_path / "mine", tokenizer="bytes").held_out is None
    assert open_data(DataConfig(corpus=str(tmp_path / "mine"), tokenizer=None)).held_out is None


def test_tokenizers_of_one_text_are_one(austen):
    assert austen.tokenizer.fingerprint != ByteTokenizer().fingerprint

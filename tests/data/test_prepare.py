import gzip
import importlib.util
import json

import pytest

from mc_jax.cli import main
from mc_jax.data._readers import Reading
from mc_jax.data.dataset import open_prepared
from mc_jax.data.documents import Document
from mc_jax.data.prepare import _sample, prepare
from mc_jax.data.split import Share
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe

TEXTS = ["the cat sat on the mat\r\n" * 30, "the other cat: naïve 😀\n" * 30, "a third\n"]


def write(path, texts=TEXTS, field="text"):
    if ".jsonl" in path.name:
        content = "".join(
            json.dumps({"id": i, field: text}) + "\n\n" for i, text in enumerate(texts)
        ).encode()
    else:
        content = "".join(texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def texts_of(store, tokenizer):
    return [tokenizer.decode(store.document(i)) for i in range(len(store))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_line_of_jsonl_is_a_document(tmp_path, name):
    dataset = prepare([write(tmp_path / name)], tmp_path / "out", vocab_size=280)
    assert texts_of(dataset.train, dataset.tokenizer) == TEXTS
    assert list(dataset.train.names) == [f"{name}:{line}" for line in (1, 3, 5)]
    assert dataset.train.text_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert dataset.tokenizer.fingerprint == train_bpe(TEXTS, 280).fingerprint


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_a_document(tmp_path, name):
    files = [write(tmp_path / name), write(tmp_path / f"b{name}", ["more"])]
    dataset = prepare(files, tmp_path / "out", tokenizer="bytes")
    assert texts_of(dataset.train, dataset.tokenizer) == ["".join(TEXTS), "more"]


def test_held_out_text_is_not_trained_on_and_a_tokenizer_can_be_given(tmp_path):
    tokenizer = train_bpe(TEXTS, 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    dataset = prepare(
        [write(tmp_path / "a.jsonl", field="content")],
        tmp_path / "deep" / "out",
        held_out=[write(tmp_path / "b.jsonl", ["held", "", "out"], field="content")],
        tokenizer=tmp_path / "tokenizer.json",
        reading=Reading(text_field="content"),
    )
    assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
    assert texts_of(dataset.held_out, tokenizer) == ["held", "out"]
    assert len(dataset.train) == 3
    manifest = json.loads((tmp_path / "deep" / "out" / "manifest.json").read_text())
    assert manifest["splits"]["held_out"]["files"] == ["b.jsonl"]


def test_an_empty_folder_may_be_filled_and_a_full_one_not(tmp_path):
    (tmp_path / "out").mkdir()
    source = write(tmp_path / "a.txt")
    prepare([source], tmp_path / "out", tokenizer="bytes")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        prepare([source], tmp_path / "out", tokenizer="bytes")


def test_a_corpus_beyond_the_bound_is_sampled_evenly():
    documents = [Document(str(i), f"{i:04} ") for i in range(1000)]
    assert list(_sample(lambda: documents, 5000, 10**6)) == [document.text for document in documents]
    sample = _sample(lambda: documents, 5000, 1000)
    assert [int(text) for text in sample] == list(range(0, 1000, 8))


def settings_errors(tmp_path):
    source = write(tmp_path / "a.txt")
    jsonl = write(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir(exist_ok=True)
    return [
        ({"inputs": []}, "at least one file"),
        ({"inputs": [tmp_path / "none.txt"]}, "there is no file .*none.txt"),
        ({"inputs": [tmp_path / "empty"]}, r"no file of a known format in .*empty"),
        ({"inputs": [write(tmp_path / "a.csv")]}, "no known format"),
        ({"inputs": [source, source]}, "given twice"),
        ({"inputs": [source], "held_out": [source]}, "given twice"),
        ({"inputs": [source], "tokenizer": "bpe"}, "set vocab_size"),
        ({"inputs": [source], "vocab_size": 300}, "vocab_size 300 has no effect with tokenizer 'bytes'"),
        ({"inputs": [source], "tokenizer": tmp_path / "none.json"}, "there is no tokenizer at .*none.json"),
        (
            {"inputs": [jsonl], "reading": Reading(text_field="body")},
            r"a.jsonl:1 has no text in field 'body' \(it has: id, text\)",
        ),
    ]


def content_errors(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return {"inputs": [tmp_path / name]}

    good = b'{"text": "good"}\n'
    return [
        (file("b.txt", b"\xff"), "b.txt is not UTF-8"),
        (file("b.jsonl", good + b"\xff\n"), "b.jsonl:2 is not UTF-8"),
        (file("c.jsonl", good + b"{\n"), "c.jsonl:2 is not JSON"),
        (file("d.jsonl", good + b'["text"]\n'), "d.jsonl:2 has no text"),
        (file("e.jsonl", good + b'{"text": null}\n'), "e.jsonl:2 has no text"),
        (file("f.jsonl", good + b'{"text": "\\ud800"}\n'), "f.jsonl:2 is no valid Unicode"),
        (file("g.txt.gz", gzip.compress(b"text" * 99)[:-9]), "g.txt.gz cannot be read"),
        (file("h.txt.gz", b"text"), "h.txt.gz cannot be read"),
        (file("i.txt", b""), "no text to write"),
    ]


@pytest.mark.parametrize("cases", [settings_errors, content_errors])
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(tmp_path, cases):
    for settings, message in cases(tmp_path):
        with pytest.raises(ValueError, match=message) as caught:
            prepare(output=tmp_path / "out", **({"tokenizer": "bytes"} | settings))
        assert "\n" not in str(caught.value)
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]
        assert left == [], f"after {message!r}"


def test_parquet_without_its_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pyarrow.*scripts/setup hf"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer="bytes")


def test_each_row_of_parquet_is_a_document(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hf")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": TEXTS}), tmp_path / "a.parquet")
    dataset = prepare([tmp_path / "a.parquet"], tmp_path / "out", tokenizer="bytes")
    assert texts_of(dataset.train, ByteTokenizer()) == TEXTS
    with pytest.raises(ValueError, match=r"no text in field 'body' \(it has: id, text\)"):
        prepare(
            [tmp_path / "a.parquet"],
            tmp_path / "other",
            tokenizer="bytes",
            reading=Reading(text_field="body"),
        )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read"):
        prepare([tmp_path / "b.parquet"], tmp_path / "other", tokenizer="bytes")


def test_a_hundredth_of_the_documents_is_split_off_the_same_every_time(tmp_path):
    texts = [f"document {number}, which is one of many" for number in range(300)]
    source = write(tmp_path / "a.jsonl", ["", *texts])
    first, second = (prepare([source], tmp_path / name, held_out=Share(), vocab_size=270) for name in "xy")
    held_out, train = texts_of(first.held_out, first.tokenizer), texts_of(first.train, first.tokenizer)
    assert len(held_out) == 3
    assert sorted(held_out + train) == sorted(texts), "each document is in one part, whole"
    assert texts_of(second.held_out, second.tokenizer) == held_out
    assert first.tokenizer.fingerprint == train_bpe(train, 270).fingerprint, "made of what is trained on"


def test_of_few_documents_the_end_of_the_longest_is_split_off(tmp_path):
    files = [write(tmp_path / "a.txt", ["short"]), write(tmp_path / "b.txt", ["some words " * 100])]
    dataset = prepare(files, tmp_path / "out", held_out=Share(), tokenizer="bytes")
    assert texts_of(dataset.held_out, dataset.tokenizer) == ["some words "]
    assert texts_of(dataset.train, dataset.tokenizer) == ["short", "some words " * 99]
    assert list(dataset.held_out.names) == ["b.txt from character 1089 on"]
    with pytest.raises(ValueError, match="too little text to split off"):
        prepare([write(tmp_path / "c.txt", ["x"])], tmp_path / "other", held_out=Share(), tokenizer="bytes")
    assert not (tmp_path / "other").exists()


def test_the_command_says_what_was_split_off_and_can_be_told_not_to(tmp_path, capsys):
    words = ["prepare", str(write(tmp_path / "a.txt")), "--tokenizer", "bytes", "--output"]
    assert main([*words, str(tmp_path / "split")]) == 0
    assert "held out was split off the inputs: a.txt from character " in capsys.readouterr().out
    assert main([*words, str(tmp_path / "whole"), "--held-out", "none"]) == 0
    assert "held" not in capsys.readouterr().out
    assert open_prepared(tmp_path / "split").held_out is not None
    assert open_prepared(tmp_path / "whole").held_out is None

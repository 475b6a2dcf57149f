"""The dial's page: it needs no other file, says what was found, and is sorted, filtered and fits a phone."""

import numpy as np
import pytest
from html_pages import HtmlPage, must_fit_in_a_browser, must_load_nothing

from mc_jax.evaluation.sweep.page import dial_page
from mc_jax.evaluation.sweep.runner import Outcome
from mc_jax.evaluation.sweep.table import rows_of
from mc_jax.evaluation.sweep.view import bytes_in_words, pareto


def _result(mode="windows", aggregation="gated", segment=64, length=512, bits=1.9, memory=600_000, **more):
    is_own = (aggregation, segment, length) == ("gated", 64, 512)
    tokens = np.full(40, 100)
    nats = tokens * bits + np.sin(np.arange(40) + bits)
    routed = aggregation in ("gated", "sparse")
    layer = {"cached_share": 0.4, "entropy": 1.0, "relative_entropy": 0.8, "share_by_distance": [0.4]}
    buckets = [
        {"from": first, "to": 2 * first, "bits_per_byte": bits + 3 / (first + 1)}
        for first in (0, 1, 3, 7, 15)
    ]
    return {
        "run": "runs/<quick>",
        "step": 440,
        "is_own": is_own,
        "settings": {
            "mode": mode,
            "aggregation": aggregation,
            "segment_length": segment,
            "top_k": 1 if aggregation == "sparse" else None,
            "segmentation": "constant",
            "context_length": length,
        },
        "measurement": {
            "bits_per_byte": bits,
            "bits_per_byte_standard_error": 0.01,
            "loss": 3 * bits,
            "perplexity": 40.0,
            "word_perplexity": 90.0,
            "tokens": 4000,
            "bytes": 12000,
            "words": 2000,
            "documents": 40,
            "seconds": 1.5 + memory / 1e6,
            "cache_bytes": memory + 5000,
            "hashes": {"checkpoint": "c" * 64, "tokenizer": "t" * 64, "text": "e" * 64},
            "standard_error_over": "40 documents",
            "units": {
                "block_length": None,
                "nats": nats.tolist(),
                "tokens": tokens.tolist(),
                "bytes": (3 * tokens).tolist(),
                "words": tokens.tolist(),
            },
            **({"by_position": buckets} if mode == "by-position" else {}),
        },
        "first_batch_seconds": 1.0,
        "costs": {
            "cell": {"memory_bytes": memory, "flops_per_token": 4e6 + memory},
            "attention": {"memory_bytes": 3072 * length, "flops_per_token": 5e6},
            "recurrence": {"memory_bytes": 73_000, "flops_per_token": 3.9e6},
        },
        "router": {"even_cached_share": 0.7, "layers": [{"layer": 1, **layer}, {"layer": 2, **layer}]}
        if routed
        else None,
        "command": f"mc-jax eval 'runs/<quick>' --model.aggregation {aggregation}",
        "device": "cpu",
        "devices": 1,
    } | more


RESULTS = [
    _result(),
    _result(segment=32, bits=1.893, memory=1_200_000),
    _result(length=2048, bits=1.905, memory=2_400_000),
    _result(aggregation="sparse", bits=1.91),
    _result(aggregation="none", bits=1.914, memory=73_000),
    _result(mode="by-position"),
    _result(mode="by-position", aggregation="none", bits=1.92, memory=73_000),
]
TOLD = {
    "command": "mc-jax sweep runs/<quick>",
    "left_out": ["top_k has no effect"],
    "failed": ["x: no memory"],
}


@pytest.fixture(scope="module")
def text() -> str:
    return dial_page(RESULTS, rows_of(Outcome(results=tuple(RESULTS), failed=())), TOLD)


def test_the_page_needs_no_other_file(text):
    must_load_nothing(text, runs=True)


def test_it_says_what_was_found_and_how_to_find_it_again(text):
    words = " ".join(HtmlPage(text).text.split())
    for expected in (
        "The capacity dial of <quick>",
        "1.9000",
        "± 0.0100, as trained",
        "586 KiB",
        "1.5 MiB",
        "with its caches off",
        "Loss by context length",
        "Loss by position",
        "What the routers read",
        "mc-jax eval 'runs/<quick>' --model.aggregation sparse",
        "mc-jax sweep runs/<quick>",
        "top_k has no effect",
        "x: no memory",
        "e" * 16,
    ):
        assert expected in words, f"{expected!r} is not on the page"


def test_a_section_without_data_is_left_out():
    results = RESULTS[3:5]
    words = dial_page(results, rows_of(Outcome(results=tuple(results), failed=())), TOLD)
    assert "Loss by context length" not in words
    assert "Loss by position" not in words
    assert "Quality against memory" in words


def test_one_context_length_is_no_curve_however_often_it_was_read():
    cells = [RESULTS[0], *(_result(aggregation="none", segment=segment) for segment in (32, 64))]
    words = dial_page(cells, rows_of(Outcome(results=tuple(cells), failed=())), TOLD)
    assert "Loss by context length" not in words


def test_the_front_has_those_that_no_other_beats_at_as_low_a_cost():
    assert pareto([(1, 5), (2, 4), (2, 3), (3, 3), (4, 2)]) == [0, 2, 4]
    assert pareto([(1, 1)]) == [0]


def test_bytes_have_a_unit_that_suits_them():
    assert [bytes_in_words(n) for n in (512, 73_728, 1_572_864, 1023 * 1024)] == [
        "512 B",
        "72 KiB",
        "1.5 MiB",
        "1,023 KiB",
    ]


# Types and clicks.
_USE = """
  const rows = () => [...page.querySelectorAll("table.cells tbody tr")].filter(row => !row.hidden);
  const heads = [...page.querySelectorAll("table.cells th button")];
  const place = heads.findIndex(head => head.textContent === "bits per byte");
  found.all = rows().length;
  const values = () => rows().map(row => +row.cells[place].dataset.value);
  heads[place].click(); found.rising = values();
  heads[place].click(); found.falling = values();
  const box = page.getElementById("filter");
  box.value = "sparse 64"; box.dispatchEvent(new Event("input"));
  found.filtered = rows().length; found.told = page.querySelector("output").textContent;
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_it_fits_and_is_sorted_and_filtered_without_errors(width, text, tmp_path):
    found = must_fit_in_a_browser(text, width, tmp_path, _USE)
    assert found["all"] == len(RESULTS)
    bits = sorted(result["measurement"]["bits_per_byte"] for result in RESULTS)
    assert found["rising"] == bits
    assert found["falling"] == bits[::-1]
    assert (found["filtered"], found["told"]) == (1, f"1 of {len(RESULTS)}")

"""Runs side by side: one page that needs no other file, and a table with the same figures."""

import csv
import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest
from html_pages import HtmlPage, must_load_nothing

from mc_jax.cli import main
from mc_jax.config import Config, ModelConfig, TrainingConfig, to_json
from mc_jax.evaluation.comparison import caveats, read_runs, seeds_of, settings_that_differ, write_comparison

STEPS = 20


def _metrics(routed: bool, steps: int = STEPS) -> list[dict]:
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 64 * step, "seconds": 2.0 * step, "loss": 5 / math.sqrt(step)}
        if step % 5 == 0:
            line |= {"held_out_loss": line["loss"] + 0.1}
            line |= {"router_cached_share": 0.5} if routed else {}
        lines.append(line)
    return lines


def _result(bits: float, routed: bool, **changes) -> dict:
    layer = {"cached_share": 0.5, "entropy": 1.0, "relative_entropy": 0.8, "share_by_distance": [0.3, 0.2]}
    router = {
        "distances": [[1, 1], [2, 2]],
        "even_cached_share": 0.6,
        "even_share_by_distance": [0.4, 0.2],
        "layers": [{"layer": 1, **layer}, {"layer": 3, **layer, "cached_share": 0.7}],
    }
    held_out = {"loss": 2 * bits, "perplexity": 9.0, "bits_per_byte": bits, "tokens": 70, "bytes": 90}
    return {
        "step": STEPS,
        "parameters": 1234,
        "held_out": held_out,
        "router": router if routed else None,
        "hashes": {"tokenizer": "t", "held_out_text": "h"},
        "command": "mc-jax train 'a <recipe>'",
    } | changes


def _write(folder, result=None, metrics=(), seed=0, **model):
    folder.mkdir(parents=True)
    config = Config(model=ModelConfig(**model), training=TrainingConfig(seed=seed))
    (folder / "config.json").write_text(to_json(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two that have ended, one that is being trained, and one of which nothing is known yet."""
    runs = tmp_path_factory.mktemp("runs")
    result = _result(1.8, routed=True)
    result["held_out"]["bits_per_byte_standard_error"] = 0.02
    return [
        _write(runs / "plain", _result(1.9, routed=False), _metrics(False), aggregation="none"),
        _write(runs / "gated & <b>", result, _metrics(True)),
        _write(runs / "running", None, _metrics(True, 7), segment_length=64),
        _write(runs / "begun"),
    ]


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    return write_comparison(folders, tmp_path_factory.mktemp("pages") / "new" / "compare.html")


@pytest.fixture(scope="module")
def page(written):
    return HtmlPage(written[0].read_text())


def test_the_page_needs_no_other_file_and_runs_nothing(written, page):
    assert sorted(path.name for path in written[0].parent.iterdir()) == ["compare.csv", "compare.html"]
    must_load_nothing(written[0].read_text())


def test_pictures_come_wide_and_narrow_light_and_dark(page):
    images, sources = page.named("img"), page.named("source")
    assert len(images) == 1 + 3 + 1, "results, losses over three axes, routers"
    assert all(image["alt"] for image in images)
    whens = ["(max-width: 40rem) and (prefers-color-scheme: dark)", "(max-width: 40rem)"]
    assert [source["media"] for source in sources[:3]] == [*whens, "(prefers-color-scheme: dark)"]
    pictures = set(page.pictures())
    assert len(pictures) == 4 * len(images), "two of the four are the same"
    labels = {label for text in pictures for label in re.findall(r"<text[^>]*>([^<]*)</text>", text)}
    assert {"optimizer steps", "tokens", "seconds of training", "Training", "Held-out"} <= labels
    assert {"By distance, at the end", "segments back", "1.8000 ± 0.0200"} <= labels


def test_figures_settings_and_what_to_know_of_them_are_there(page):
    text = " ".join(page.text.split())
    for words in (
        "4 runs compared",
        "Fewest bits per byte on held-out text: gated & <b>, 1.8000, 0.1000 fewer than plain.",
        "1.8000 ± 0.0200",
        "No result yet, as training has not ended: running, begun.",
        "One seed for each setting",
        "mc-jax train 'a <recipe>'",
        "Dotted grey: every memory weighed alike.",
    ):
        assert words in text, f"{words!r} is not on the page"
    assert "model.aggregation" in text
    assert "model.model_dim" not in text, "what is the same in all runs is no column"
    assert [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "best"]


def test_the_table_has_a_row_a_run_and_every_figure_in_full(written, folders):
    rows = list(csv.DictReader(written[1].open()))
    assert [row["run"] for row in rows] == [folder.name for folder in folders]
    assert [row["model.aggregation"] for row in rows] == ["none", "gated", "gated", "gated"]
    assert [row["model.segment_length"] for row in rows] == ["256", "256", "64", "256"]
    assert [row["held_out_bits_per_byte"] for row in rows] == ["1.9", "1.8", "", ""]
    assert [row["held_out_bits_per_byte_standard_error"] for row in rows] == ["", "0.02", "", ""]
    assert [row["step"] for row in rows] == ["20", "20", "7", "0"]
    assert float(rows[1]["training_loss"]) == 5 / math.sqrt(20)
    assert rows[0]["router_cached_share"] == ""
    assert float(rows[1]["router_cached_share"]) == pytest.approx(0.6), "the mean of its two layers"
    assert rows[1]["router_cached_share_layer_3"] == "0.7"


def test_runs_with_nothing_measured_are_still_compared_and_the_command_says_where(folders, tmp_path, capsys):
    page, runs = tmp_path / "c.html", [folders[3], _write(tmp_path / "other")]
    assert main(["compare", *map(str, runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"2 runs compared: {page}, {tmp_path / 'c.csv'}\n"
    text = page.read_text()
    assert "No run has been measured on held-out text" in text
    assert "No run has a step with a finite loss yet" in text
    assert "No run has a router whose reading was measured" in text


def test_what_makes_results_unlike_is_said(tmp_path):
    def told(name, seed=0, **changes):
        first = _write(tmp_path / name / "a", _result(1.8, False), _metrics(False))
        second = _write(tmp_path / name / "b", _result(1.9, False, **changes), _metrics(False), seed)
        return " ".join(caveats(read_runs([first, second])))

    assert told("same").startswith("One seed for each setting")
    assert told("seeds", seed=1) == ""
    first, second = (tmp_path / "seeds" / name for name in "ab")
    others = [_write(tmp_path / "other", _result(1.7, False), top_k=3), _write(tmp_path / "begun", seed=2)]
    (group,) = seeds_of(read_runs([others[0], first, others[1], second]))
    assert group.runs == (1, 3), "one has other settings, one no result"
    assert group.mean == pytest.approx(1.85)
    assert group.standard_error == pytest.approx(0.05), "of two numbers 0.1 apart"
    assert (
        "One seed of other, begun: what another"
        in caveats(read_runs([others[0], first, others[1], second]))[-1]
    )
    assert "Held-out texts differ" in told("text", hashes={"tokenizer": "t", "held_out_text": "other"})
    of_tokens = told("tokenizer", hashes={"tokenizer": "u", "held_out_text": "other"})
    assert "compare bits per byte, not loss or perplexity" in of_tokens
    assert "Held-out texts differ" not in of_tokens, "one text has other tokens by another tokenizer"
    assert "Trained on since the result was measured: b." in told("older", step=STEPS - 5)


def test_no_run_is_called_the_best_on_texts_that_differ(tmp_path):
    results = [_result(1.8, False), _result(1.9, False, hashes={"tokenizer": "t", "held_out_text": "other"})]
    runs = [_write(tmp_path / f"{number}", result) for number, result in enumerate(results)]
    text = write_comparison(runs, tmp_path / "c.html")[0].read_text()
    assert "Fewest bits per byte" not in text
    assert 'class="best"' not in text
    assert "1.8000" in text


def test_settings_that_differ_have_a_value_for_each_run(folders):
    differing = settings_that_differ(read_runs(folders))
    assert differing == {
        "model.aggregation": ["none", "gated", "gated", "gated"],
        "model.segment_length": [256, 256, 64, 256],
    }


def test_two_folders_of_one_name_are_called_by_their_paths(folders, tmp_path):
    other = _write(tmp_path / "plain")
    assert [run.name for run in read_runs([folders[0], other])] == [str(folders[0]), str(other)]


def test_what_cannot_be_compared_is_refused_in_one_line_and_nothing_is_written(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cut = _write(tmp_path / "cut")
    (cut / "config.json").write_text('{"model": ')
    damaged = _write(tmp_path / "damaged")
    (damaged / "result.json").write_text('{"step": ')
    plain = str(folders[0])
    for runs, output, message in (
        ([], "c.html", "nothing to compare; write mc-jax compare RUN RUN"),
        ([plain], "c.html", "nothing to compare; write mc-jax compare RUN RUN"),
        ([plain, str(tmp_path / "empty")], "c.html", "there is no run in"),
        ([plain, plain], "c.html", "is given twice; name each run once"),
        ([plain, f"{plain}/../plain"], "c.html", "is given twice, the other time as"),
        ([plain, str(folders[1])], "c.pdf", "whose name must end in .html"),
        ([plain, str(cut)], "c.html", f"{cut}: config.json is not JSON"),
        ([plain, str(damaged)], "c.html", "is not the result of a run"),
    ):
        assert main(["compare", *runs, "--output", str(tmp_path / output)]) == 2, message
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not list(tmp_path.glob("c.*"))


def test_more_runs_than_colours_differ_in_their_dashes(tmp_path):
    from mc_jax.evaluation import _plots

    runs = [
        _write(tmp_path / str(number), router_blocks=1 + number)
        for number in range(len(_plots.LIGHT.runs) + 1)
    ]
    text = write_comparison(runs, tmp_path / "c.html")[0].read_text()
    assert f".run-{len(runs) - 1} {{ border-top-style: dashed; }}" in text
    assert f".run-{len(runs) - 1} {{ border-color: {_plots.LIGHT.runs[0]}; }}" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width, written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at the page with: apt-get install chromium")
    # In a frame, for a window is never narrower than 500; the script is that of the page around it.
    tell = (
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement; "
        "document.title = [page.clientWidth, page.scrollWidth].join(' '); }"
    )
    page = html.escape(written[0].read_text())
    frame = f'<iframe style="border: 0; width: {width}px" srcdoc="{page}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<body>{frame}<script>{tell}</script></body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path}", f"file://{tmp_path}/frame.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert told is not None, done.stderr
    assert int(told[1]) == width
    assert int(told[2]) == width, "something wide does not scroll within its own box"

"""The report is one file, says what was measured, and lets nothing in that the model wrote."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from html_pages import HtmlPage, must_load_nothing

from mc_jax.evaluation.report import RouterPicture, Sample, write_report
from mc_jax.training.router_shares import Reading, RouterShares
from mc_jax.training.stages import Change

LAYERS, TOKENS, SEGMENT_LENGTH, SEGMENTS = 3, 40, 8, 5


def _router():
    """Random gates on the online memory and the segments that ended before the token's own."""
    generator = np.random.default_rng(0)
    gates = generator.uniform(0.1, 1.0, (LAYERS, TOKENS, SEGMENTS + 1)).astype(np.float32)
    segment_of_token = np.arange(TOKENS) // SEGMENT_LENGTH
    gates[:, :, :-1] *= segment_of_token[:, None] > np.arange(SEGMENTS)[None, :]
    gates /= gates.sum(axis=-1, keepdims=True)
    return RouterPicture(
        gates=gates,
        rest="online",
        layers=[1, 3, 4],
        segment_length=SEGMENT_LENGTH,
        text="a <text> that was read",
        shares=_shares(),
    )


def _shares():
    """Of three layers with two heads."""
    cached = np.array([[0.25, 0.75], [0.1, 0.3], [0.6, 0.6]])
    return RouterShares(
        layers=(1, 3, 4),
        segment_length=SEGMENT_LENGTH,
        tokens=1234,
        distances=((1, 1), (2, 2), (3, 4)),
        reading=Reading(
            cached, 2 * cached, cached / 2, cached[..., None] * np.array([0.5, 0.3, 0.2])[None, None]
        ),
        even_cached=0.7,
        even_by_distance=(0.4, 0.2, 0.1),
    )


def _metrics(steps=30):
    losses = [5.0 / math.sqrt(step) for step in range(1, steps + 1)]
    return [
        {
            "step": step,
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "learning_rate": 1e-3,
            "grad_norm": 1 / step,
            "tokens_per_second": 1000.0 + step,
        }
        for step, loss in enumerate(losses, start=1)
    ]


def _write(run_dir, **changes):
    run_dir.mkdir()
    arguments = {
        "title": "small & quick",
        "config_differences": {"model.num_layers": (3, 12), "data.tokenizer": (None, "bytes")},
        "metrics": _metrics(),
        "held_out": {
            "loss": 1.25,
            "perplexity": 3.49,
            "bits_per_byte": 1.803,
            "caches_worth": 0.0123,
            "caches_worth_standard_error": 0.0021,
            "tokens": 12345,
            "bytes": 23456,
        },
        "sample": Sample(
            prompt="It's a truth",
            text=' </pre><script>alert("x")</script>\x00 & more\n',
            sampling="temperature 0.8",
        ),
        "router": _router(),
        "facts": {"parameters": "1.02 M"},
        "made": {"date": "2026-01-02T03:04:05+00:00", "device": "2 <CPUs>", "command": "mc-jax train x"},
        "reads_cache": True,
        "stages": [Change(20, "2026-01-02", {"training.steps": (20, 30), "training.batch_size": (4, 8)})],
    } | changes
    return write_report(run_dir, **arguments)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "my run"
    _write(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(run_dir):
    return HtmlPage((run_dir / "report.html").read_text())


def test_the_report_is_one_file_that_loads_nothing(run_dir, page):
    assert [path.name for path in run_dir.iterdir()] == ["report.html"]
    must_load_nothing((run_dir / "report.html").read_text())
    for picture in page.pictures():
        for target in re.findall(r'href="([^"]*)"', picture):
            assert target.startswith(("#", "data:")), f"a picture loads {target}"


def test_every_picture_has_a_text_and_a_dark_twin(page):
    images = page.named("img")
    assert len(images) == 3
    assert all(len(image["alt"]) > 40 for image in images)
    assert "from 5.000 to 0.913 nats per token; held-out loss at the end 1.250" in images[0]["alt"]
    assert "gradient norm from 0.0333 to 1; tokens per second from 1e+03 to 1.03e+03" in images[2]["alt"]
    dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 40rem)"
    expected = [f"{narrow} and {dark}", narrow, dark] * len(images)
    assert [source["media"] for source in page.named("source")] == expected, "each picture fits a phone"
    pictures = page.pictures()
    assert len(set(pictures)) == len(pictures) == 12, "two of them are the same"


def test_headings_are_in_order(page):
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1"] + ["h2"] * 9


def test_the_figures_of_the_result_are_there(page):
    for text in (
        "1.803",
        "3.49",
        "1.250",
        "0.913",
        "training, step 30",
        "12,345 tokens",
        "23,456 bytes",
        "1.02 M",
        "read from cached memoriesheld-out; 70% if all were weighed alike43%",
    ):
        assert text in page.text, f"{text} is not in the report"


def test_what_the_model_wrote_stays_text(page):
    assert ' </pre><script>alert("x")</script>� & more\n' in page.text
    assert "a <text> that was read" in page.text
    assert "2 <CPUs>" in page.text
    assert "small & quick" in page.text


def test_settings_and_commands_are_there(run_dir, page):
    assert "model.num_layers312" in page.text
    assert "data.tokenizerNonebytes" in page.text
    assert f"mc-jax eval '{run_dir}'" in page.text, "a folder with a space must be quoted"
    assert f"""mc-jax generate '{run_dir}' --prompt 'It'"'"'s a truth'""" in page.text
    assert f"mc-jax eval '{run_dir}' --model.aggregation none" in page.text


def test_when_where_and_how_it_was_made_is_there(page):
    assert "date2026-01-02T03:04:05+00:00device2 <CPUs>commandmc-jax train x" in page.text


def right_axis(page) -> tuple[list[float], str]:
    """Numbers of the axis of bits, which is drawn last, and its label."""
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page.pictures()[0])
    (place,) = (at for at, label in enumerate(labels) if label.startswith("bits per byte"))
    numbers = []
    for label in reversed(labels[:place]):
        if not re.fullmatch(r"[\d.]+", label):
            break
        numbers.append(float(label))
    return numbers, labels[place]


def test_the_axis_of_bits_is_of_the_text_whose_figures_are_shown(tmp_path):
    metrics = [{"step": step, "loss": 4.0 / step, "bits_per_byte": 40.0 / step} for step in range(1, 5)]
    measured = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "tokens": 10, "bytes": 20}
    for name, held_out in (("held-out", measured), ("training", None)):
        page = HtmlPage(
            _write(tmp_path / name, router="None.", metrics=metrics, held_out=held_out).read_text()
        )
        numbers, label = right_axis(page)
        assert label == f"bits per byte ({name} text)"
        assert (max(numbers) < 4) == (held_out is not None), f"{name}: {numbers}"


def test_what_changed_on_the_way_is_there(page):
    assert "after stepwhenfieldfromto202026-01-02training.steps2030" in page.text
    assert "202026-01-02training.batch_size48" in page.text


def test_the_heat_maps_name_layers_and_memories(page):
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page.pictures()[1])
    assert {"Layer 1", "Layer 3", "Layer 4", "online", "token position", "share of the reading"} <= set(
        labels
    )


def test_what_layers_read_on_average_is_a_row_each_and_the_last_is_of_equal_weights(page):
    text = page.text.replace("\n", "")
    assert "mean over 1,234 tokens" in text
    assert "layercached memories1 back2 back3 to 4 backentropy, natsof equalheads" in text
    assert "150.0%25.0%15.0%10.0%1.0025%25% to 75%" in text
    assert "320.0%10.0%6.0%4.0%0.4010%10% to 30%" in text
    assert "all alike70.0%40.0%20.0%10.0%100%" in text


def test_without_router_held_out_text_or_settings_the_report_says_so(tmp_path):
    router = "This aggregation has no router."
    path = _write(
        tmp_path / "run",
        router=router,
        held_out=None,
        config_differences={},
        metrics=_metrics(1),
        reads_cache=False,
    )
    page = HtmlPage(path.read_text())
    assert "no router" in page.text
    assert "Nothing was measured on held-out text" in page.text
    assert "every field has its default" in page.text
    assert "--text FILE" in page.text, "a run without held-out text can be measured on another"
    assert "--model.aggregation none" not in page.text, "a model that reads no cache has no such setting"
    assert len(page.named("img")) == 2


def test_a_text_of_one_segment_has_nothing_to_read(tmp_path):
    gates = np.ones((LAYERS, SEGMENT_LENGTH, 2), np.float32) * np.array([0.0, 1.0], np.float32)[None, None, :]
    router = RouterPicture(
        gates=gates, rest="online", layers=[1, 2, 3], segment_length=SEGMENT_LENGTH, text="short", shares=None
    )
    page = HtmlPage(_write(tmp_path / "run", router=router, metrics=[]).read_text())
    assert "fits in one segment" in page.text
    assert page.named("img") == []


def test_steps_without_a_finite_loss_are_left_out_and_counted(tmp_path):
    metrics = _metrics(10)
    metrics[4] = {"step": 5, "loss": math.nan, "bits_per_byte": math.nan}
    page = HtmlPage(_write(tmp_path / "run", router="There is none.", metrics=metrics).read_text())
    assert "1 step whose loss was not finite is left out" in page.text


def test_what_the_caches_are_worth_stands_beside_the_result(run_dir):
    words = " ".join(HtmlPage((run_dir / "report.html").read_text()).text.split())
    assert "± 0.0021, held-out, with its caches off" in words
    assert "+0.0123" in words


def test_held_out_losses_while_training_are_dots_in_the_curve(tmp_path):
    metrics = _metrics(10)
    metrics[4] |= {"held_out_loss": 2.5, "held_out_bits_per_byte": 3.6}
    metrics[9] |= {"held_out_loss": math.nan, "held_out_bits_per_byte": math.nan}
    page = HtmlPage(_write(tmp_path / "run", router="There is none.", metrics=metrics).read_text())
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page.pictures()[0])
    assert "held-out" in labels
    assert "Dots: held-out loss" in page.text


def test_what_routers_read_while_training_is_a_curve(tmp_path):
    metrics = _metrics(10)
    for step in (5, 10):
        metrics[step - 1] |= {f"router_cached_share_layer_{layer}": 0.9 / step for layer in (1, 3, 4)}
    metrics[7] |= {f"router_cached_share_layer_{layer}": math.nan for layer in (1, 3, 4)}
    page = HtmlPage(_write(tmp_path / "run", metrics=metrics).read_text())
    assert "from 18% at step 5 to 9% at step 10; 70% if all" in page.named("img")[2]["alt"]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page.pictures()[2])
    assert {"each layer", "mean of the layers", "all weighed alike"} <= set(labels)


def test_long_runs_keep_their_peaks_and_a_small_picture():
    from mc_jax.evaluation import _plots

    steps, loss = np.arange(1, 50_001), np.full(50_000, 2.0)
    loss[12_345] = 9.0
    shown_steps, shown = _plots.thin(steps, loss)
    assert len(shown) <= 2000
    assert shown_steps[np.argmax(shown)] == 12_346
    assert np.all(np.diff(shown_steps) > 0)


def test_a_running_mean_is_a_mean_at_the_ends_too():
    from mc_jax.evaluation import _plots

    np.testing.assert_allclose(_plots.running_mean(np.full(7, 3.0), 5), 3.0)
    np.testing.assert_allclose(_plots.running_mean(np.arange(7.0), 3), [0.5, 1, 2, 3, 4, 5, 5.5])


def test_importing_the_report_leaves_matplotlib_alone():
    check = "import sys, mc_jax.evaluation.report; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], check=False)
    assert done.returncode == 0, "matplotlib takes seconds to import: import it where a report is written"

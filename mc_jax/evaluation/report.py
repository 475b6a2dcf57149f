"""The report of a run: one HTML file that needs nothing else, to read, keep and send.

L layers, T tokens, S cached segments.
"""

import base64
import dataclasses
import html
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mc_jax.data.files import write_text
from mc_jax.training.stages import Change

REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterPicture:
    """What a trained router reads over one text."""

    gates: np.ndarray
    """[L, T, S + 1] float: mean over heads of each token's gate on each cached segment, the online memory
    last; a token's gates sum to 1. S is at least the number of segments that end before the last token."""
    layers: Sequence[int]
    """The numbers, from 1, of the L layers that have a memory."""
    segment_length: int
    """Tokens of a segment."""
    text: str
    """The text that was read."""


def write_report(
    run_dir: epath.PathLike,
    *,
    title: str,
    config_differences: dict[str, tuple[Any, Any]],
    metrics: list[dict[str, Any]],
    held_out: dict[str, float] | None,
    sample_prompt: str,
    sample: str,
    router: RouterPicture | str,
    facts: dict[str, str],
    stages: Sequence[Change] = (),
) -> epath.Path:
    """Write `report.html` into a run's folder, whole or not at all.

    Args:
      run_dir: The run's folder, as the commands in the report name it.
      title: Heading, for example the run's name.
      config_differences: (value, default) of each config field that differs from its default.
      metrics: One dict a step, as `read_metrics` gives them; step, loss, bits_per_byte
        and, where it is there, held_out_loss are drawn.
      held_out: loss (nats per token), perplexity (per token), bits_per_byte, tokens, bytes; None: not
        measured.
      sample_prompt: What the sample goes on from.
      sample: What the model wrote after it.
      router: What the router reads, or a sentence that says why there is nothing to show.
      facts: Short texts by name: parameters, tokens, time, device.
      stages: What changed while it was trained, if anything did.

    Returns:
      Where the report is.
    """
    # matplotlib, behind this, takes seconds to import: only who writes a report waits for it.
    from mc_jax.evaluation import _plots

    run_dir = epath.Path(run_dir)
    sections = [
        _section("Result", _result(metrics, held_out, facts)),
        _section("Loss", _loss(_plots, metrics, held_out)),
        _section("What the router reads", _router(_plots, router)),
        _section("Sample", _sample(sample_prompt, sample)),
        _section("Settings that differ from the defaults", _settings(config_differences)),
        *([_section("Settings that changed on the way", _stages(stages))] if stages else []),
        _section("How to go on", _commands(run_dir, sample_prompt)),
    ]
    page = _PAGE.format(title=_escape(title), style=_STYLE, body="\n".join(sections))
    write_text(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def _result(metrics: list[dict[str, Any]], held_out: dict[str, float] | None, facts: dict[str, str]) -> str:
    figures = []
    note = "Nothing was measured on held-out text."
    if held_out is not None:
        figures += [
            (f"{held_out['bits_per_byte']:.3f}", "bits per byte", "held-out"),
            (f"{held_out['perplexity']:,.2f}", "perplexity per token", "held-out"),
            (f"{held_out['loss']:.3f}", "loss, nats per token", "held-out"),
        ]
        note = (
            f"Measured on {held_out['tokens']:,.0f} tokens ({held_out['bytes']:,.0f} bytes) "
            "that training never saw."
        )
    if metrics:
        last = metrics[-1]
        figures.append((f"{last['loss']:.3f}", "loss, nats per token", f"training, step {last['step']:,}"))
    tiles = "".join(
        f'<div class="figure"><dt>{_escape(label)}<span>{_escape(where)}</span></dt><dd>{value}</dd></div>'
        for value, label, where in figures
    )
    rows = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="figures">{tiles}</dl><p class="note">{note}</p><dl class="facts">{rows}</dl>'


def _loss(plots: Any, metrics: list[dict[str, Any]], held_out: dict[str, float] | None) -> str:
    finite = [line for line in metrics if math.isfinite(line["loss"])]
    if not finite:
        return "<p>No step has a finite loss.</p>"
    steps = np.array([line["step"] for line in finite])
    loss = np.array([line["loss"] for line in finite], float)
    bits_per_byte = np.array([line["bits_per_byte"] for line in finite], float)
    held_out_loss = None if held_out is None else held_out["loss"]
    lines = [line for line in finite if math.isfinite(line.get("held_out_loss", math.nan))]
    measured = np.array([line["step"] for line in lines]), np.array([line["held_out_loss"] for line in lines])
    alternative = (
        f"Training loss over steps {steps[0]:,} to {steps[-1]:,}, "
        f"from {loss[0]:.3f} to {loss[-1]:.3f} nats per token"
    )
    if held_out_loss is not None:
        alternative += f"; held-out loss at the end {held_out_loss:.3f}"
    caption = "Loss of each training step and its running mean."
    if lines:
        caption += " Dots: held-out loss at that step, on the part of the text that evaluation.tokens names."
    missing = len(metrics) - len(finite)
    if missing:
        subject = (
            "1 step whose loss was not finite is"
            if missing == 1
            else f"{missing:,} steps whose loss was not finite are"
        )
        caption += f" {subject} left out."
    ratio = float(bits_per_byte.mean() / loss.mean())
    return _picture(
        lambda theme: plots.loss_curve(steps, loss, ratio, held_out_loss, measured, theme),
        plots,
        alternative,
        caption,
    )


def _router(plots: Any, router: RouterPicture | str) -> str:
    if isinstance(router, str):
        return f"<p>{_escape(router)}</p>"
    _, tokens, columns = router.gates.shape
    ended = (tokens - 1) // router.segment_length
    assert columns > ended, f"{columns} columns of gates for {ended} cached segments and the online memory"
    if ended == 0:
        return (
            f"<p>The text has {tokens:,} tokens and fits in one segment of {router.segment_length:,}: "
            "there was no cached memory to read.</p>"
        )
    segment_of_token = np.arange(tokens) // router.segment_length
    may_read = segment_of_token[:, None] > np.arange(ended)[None, :]
    cached = np.where(may_read, router.gates[:, :, :ended].astype(float), np.nan)
    gates = np.concatenate([cached, router.gates[:, :, -1:].astype(float)], axis=-1)
    online, latest, older = _shares(gates, router.segment_length)
    alternative = (
        f"One heat map a layer, layers {router.layers[0]} to {router.layers[-1]}: the share of each of "
        f"{tokens:,} tokens' reading that comes from cached segments 1 to {ended} and from the online "
        "memory; the table below has the means"
    )
    caption = (
        "A column is a token, a row a memory: the more the colour stands out from the page, the more of what "
        "that token read came from there, and each column adds up to 100%. Blank: segments that had not "
        "ended yet. Vertical lines: ends of segments. The colour scale is a square root, so that small "
        "shares show."
    )
    rows = "".join(
        f'<tr><th scope="row">{number}</th><td>{online[layer]:.1%}</td><td>{latest[layer]:.1%}</td>'
        f"<td>{older[layer]:.1%}</td></tr>"
        for layer, number in enumerate(router.layers)
    )
    return (
        _picture(
            lambda theme: plots.router_reads(gates, router.layers, router.segment_length, theme),
            plots,
            alternative,
            caption,
        )
        + '<div class="wide"><table class="numbers"><caption>Mean share of the reading, over tokens with at '
        'least one cached segment</caption><thead><tr><th scope="col">layer</th><th scope="col">online memory'
        '</th><th scope="col">latest cached segment</th><th scope="col">older cached segments</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        f"<details><summary>The text that was read</summary><pre>{_escape(router.text)}</pre></details>"
    )


def _shares(gates: np.ndarray, segment_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[L, T, S + 1] -> three [L]: mean gates on the online, the latest cached and the older memories."""
    positions = np.arange(segment_length, gates.shape[1])
    reading = gates[:, segment_length:, :]
    latest = reading[:, np.arange(len(positions)), positions // segment_length - 1]
    online = reading[:, :, -1]
    older = np.nansum(reading, axis=-1) - online - latest
    return online.mean(axis=1), latest.mean(axis=1), np.maximum(older, 0.0).mean(axis=1)


def _sample(prompt: str, sample: str) -> str:
    return (
        f'<pre class="sample"><span class="prompt">{_escape(prompt)}</span>{_escape(sample)}</pre>'
        '<p class="note">The prompt is shaded; the model wrote the rest.</p>'
    )


def _settings(differences: dict[str, tuple[Any, Any]]) -> str:
    if not differences:
        return "<p>None: every field has its default.</p>"
    rows = "".join(
        f'<tr><th scope="row"><code>{_escape(name)}</code></th><td><code>{_escape(str(value))}</code></td>'
        f'<td class="default"><code>{_escape(str(default))}</code></td></tr>'
        for name, (value, default) in differences.items()
    )
    return (
        '<div class="wide"><table><thead><tr><th scope="col">field</th><th scope="col">this run</th>'
        f'<th scope="col">default</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _stages(stages: Sequence[Change]) -> str:
    rows = "".join(
        f"<tr><td>{step:,}</td><td>{_escape(began)}</td><td><code>{_escape(name)}</code></td>"
        f"<td><code>{_escape(str(old))}</code></td><td><code>{_escape(str(new))}</code></td></tr>"
        for step, began, changed in stages
        for name, (old, new) in changed.items()
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("after step", "when", "field", "from", "to"))
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>'


def _commands(run_dir: epath.Path, prompt: str) -> str:
    run, prompt = shlex.quote(str(run_dir)), shlex.quote(prompt)
    # Where the program is, for who has not entered its environment: scripts/train has not.
    environment = os.path.relpath(sys.prefix) if sys.prefix.startswith(os.getcwd()) else sys.prefix
    commands = (
        ("In the environment that trained it:", f"source {shlex.quote(environment)}/bin/activate"),
        ("Measure it on held-out text again, or on other settings:", f"mc-jax eval {run}"),
        ("Let it write:", f"mc-jax generate {run} --prompt {prompt}"),
    )
    return "".join(f"<p>{text}</p><pre><code>{_escape(command)}</code></pre>" for text, command in commands)


def _picture(draw: Callable[[Any], str], plots: Any, alternative: str, caption: str) -> str:
    """A figure of two SVG pictures, of which the reader's light or dark page shows its own."""
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(draw(theme).encode()).decode()
        for theme in (plots.LIGHT, plots.DARK)
    )
    return (
        f'<figure><div class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_escape(alternative)}"></picture></div>'
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{_escape(heading)}</h2>{content}</section>"


def _escape(text: str) -> str:
    """Text as HTML; control characters, which a model of bytes may write, as the replacement sign."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    return html.escape(shown)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><p>Memory Caching run</p><h1>{title}</h1></header>
{body}
</main>
</body>
</html>
"""

# The same colours as the pictures' (_plots.Theme).
_STYLE = """
:root { --page: #ffffff; --panel: #f5f6f8; --ink: #1c1d1f; --muted: #63666b; --edge: #e6e7e9; --tint: #dbe8f8;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --panel: #1d2024; --ink: #e8e9eb; --muted: #9da1a8; --edge: #2e3136;
    --tint: #24405f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
header p { margin: 0; color: var(--muted); font-size: 0.875rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0 0 0.9rem; font-size: 1.15rem; font-weight: 650; }
section { margin-top: 2rem; padding-top: 1.5rem; border-top: 1px solid var(--edge); }
p { margin: 0 0 0.5rem; }
.note, figcaption, caption { color: var(--muted); font-size: 0.875rem; }
dl, dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.75rem;
  margin-bottom: 0.75rem; }
.figure { display: flex; flex-direction: column-reverse; justify-content: flex-end; background: var(--panel);
  border-radius: 0.5rem; padding: 0.9rem 1rem; }
.figure dd { font-size: 1.9rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.figure dt { font-size: 0.9rem; }
.figure dt span { display: block; color: var(--muted); font-size: 0.8125rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 0.6rem 1.5rem;
  margin-top: 1.25rem; }
.facts dt { color: var(--muted); font-size: 0.8125rem; }
figure { margin: 0; }
img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption { margin-top: 0.6rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; padding: 1.25rem 0 0.4rem; }
th, td { text-align: left; font-weight: 400; padding: 0.35rem 1.75rem 0.35rem 0;
  border-bottom: 1px solid var(--edge); vertical-align: top; }
thead th { color: var(--muted); font-size: 0.8125rem; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers td, .numbers thead th { text-align: right; padding: 0.35rem 0 0.35rem 1.75rem; }
.numbers th:first-child { text-align: left; padding-left: 0; }
.default { color: var(--muted); }
pre, code { font: 0.875rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0.35rem 0 1rem; padding: 0.8rem 1rem; background: var(--panel); border-radius: 0.5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { font-family: Georgia, "Times New Roman", serif; font-size: 1rem; line-height: 1.65; }
.prompt { background: var(--tint); border-radius: 0.2rem; padding: 0.1rem 0; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.875rem; }
details pre { max-height: 24rem; overflow-y: auto; }
"""

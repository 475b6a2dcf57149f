"""The report of a run: one HTML file that needs nothing else, to read, keep and send.

L layers, T tokens, S cached segments.
"""

import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mc_jax.data.files import write_text
from mc_jax.evaluation._page import escape, page, responsive_picture, section
from mc_jax.evaluation._router_figure import router_figure
from mc_jax.training.router_shares import RouterShares
from mc_jax.training.stages import Change

REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterPicture:
    """What a trained router reads over one text."""

    gates: np.ndarray
    """[L, T, S + 1] float: mean over heads of each token's shares of cached segments, the online memory or
    the null last; they add up to 1. S is at least the number of segments that end before the last token."""
    rest: str
    """What the last share is of: "online" or "null"."""
    layers: Sequence[int]
    """The numbers, from 1, of the L layers that have a memory."""
    segment_length: int
    """Tokens of a segment."""
    text: str
    """The text that was read."""
    shares: RouterShares | None
    """What is read of held-out text, on average; None: that was not measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a trained model writes."""

    prompt: str
    """What it goes on from."""
    text: str
    """What it wrote; "": it was not asked."""
    sampling: str
    """How tokens were drawn, in words."""


def write_report(
    run_dir: epath.PathLike,
    *,
    title: str,
    config_differences: dict[str, tuple[Any, Any]],
    metrics: list[dict[str, Any]],
    held_out: dict[str, float] | None,
    sample: Sample,
    router: RouterPicture | str,
    facts: dict[str, str],
    made: dict[str, str],
    stages: Sequence[Change] = (),
    reads_cache: bool = False,
) -> epath.Path:
    """Write `report.html` into a run's folder, whole or not at all.

    Args:
      run_dir: The run's folder, as the commands in the report name it.
      title: Heading, for example the run's name.
      config_differences: (value, default) of each config field that differs from its default.
      metrics: One dict a step, as `read_metrics` gives them; step, loss, bits_per_byte and, where they are
        there, held_out_loss, learning_rate, grad_norm and tokens_per_second are drawn.
      held_out: loss (nats per token), perplexity (per token), bits_per_byte, tokens, bytes, and caches_worth,
        what bits_per_byte gains by cached memories, where there are some; None: not measured.
      sample: What the model wrote.
      router: What the router reads, or a sentence that says why there is nothing to show.
      facts: Short texts by name: parameters, tokens, time.
      made: Texts by name that may be longer: date, command, device, versions.
      stages: What changed while it was trained, if anything did.
      reads_cache: Whether the model reads cached memories, without which it can be measured.

    Returns:
      Where the report is.
    """
    # matplotlib, behind this, takes seconds to import: only who writes a report waits for it.
    from mc_jax.evaluation import _plots

    run_dir = epath.Path(run_dir)
    sections = [
        section("Result", _result(metrics, held_out, facts, router)),
        section("Loss", _loss(_plots, metrics, held_out)),
        section("What the router reads", _router(_plots, router, metrics)),
        *([section("Sample", _sample(sample))] if sample.text else []),
        *_training(_plots, metrics),
        section("Settings that differ from the defaults", _settings(config_differences)),
        *([section("Settings that changed on the way", _stages(stages))] if stages else []),
        section("How it was made", _made(made)),
        section("How to go on", _commands(run_dir, sample.prompt, held_out is not None, reads_cache)),
    ]
    write_text(run_dir / REPORT_FILE, page(title, "Memory Caching run", sections))
    return run_dir / REPORT_FILE


def _result(
    metrics: list[dict[str, Any]],
    held_out: dict[str, float] | None,
    facts: dict[str, str],
    router: RouterPicture | str,
) -> str:
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
        if "caches_worth" in held_out:
            error = held_out.get("caches_worth_standard_error")
            where = f"{'' if error is None else f'± {error:.4f}, '}held-out, with its caches off"
            figures.insert(1, (f"{held_out['caches_worth']:+.4f}", "bits per byte", where))
    if metrics:
        last = metrics[-1]
        figures.append((f"{last['loss']:.3f}", "loss, nats per token", f"training, step {last['step']:,}"))
    if isinstance(router, RouterPicture) and router.shares is not None:
        share = router.shares.reading.cached.mean()
        even = f"held-out; {router.shares.even_cached:.0%} if all were weighed alike"
        figures.append((f"{share:.0%}", "read from cached memories", even))
    tiles = "".join(
        f'<div class="figure"><dt>{escape(label)}<span>{escape(where)}</span></dt><dd>{value}</dd></div>'
        for value, label, where in figures
    )
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="figures">{tiles}</dl><p class="note">{note}</p><dl class="facts">{rows}</dl>'


def _loss(plots: Any, metrics: list[dict[str, Any]], held_out: dict[str, float] | None) -> str:
    finite = [line for line in metrics if math.isfinite(line["loss"])]
    if not finite:
        return "<p>No step has a finite loss.</p>"
    steps = np.array([line["step"] for line in finite])
    loss = np.array([line["loss"] for line in finite], float)
    held_out_loss = None if held_out is None else held_out["loss"]
    lines = [line for line in finite if math.isfinite(line.get("held_out_loss", math.nan))]
    measured = np.array([line["step"] for line in lines]), np.array([line["held_out_loss"] for line in lines])
    alternative = (
        f"Training loss over steps {steps[0]:,} to {steps[-1]:,}, "
        f"from {loss[0]:.3f} to {loss[-1]:.3f} nats per token"
    )
    if held_out_loss is not None:
        alternative += f"; held-out loss at the end {held_out_loss:.3f}"
    caption = "Loss of each training step and its running mean, on a logarithmic axis."
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
    # A token of the one text has not as many bytes as one of the other: the axis is that of the tiles.
    if held_out is None:
        ratio = float(np.mean([line["bits_per_byte"] for line in finite]) / loss.mean())
    else:
        ratio = held_out["bits_per_byte"] / held_out["loss"]
    axis = f"bits per byte ({'training' if held_out is None else 'held-out'} text)"
    return responsive_picture(
        lambda theme, narrow: plots.loss_curve(
            plots.Losses(
                steps=steps, loss=loss, held_out=held_out_loss, measured=measured, bits=(ratio, axis)
            ),
            theme,
            narrow=narrow,
        ),
        plots,
        alternative,
        caption,
    )


def _router(plots: Any, router: RouterPicture | str, metrics: list[dict[str, Any]]) -> str:
    if isinstance(router, str):
        return f"<p>{escape(router)}</p>"
    _, tokens, columns = router.gates.shape
    ended = (tokens - 1) // router.segment_length
    assert columns > ended, f"{columns} columns of gates for {ended} cached segments and the online memory"
    if ended == 0:
        return (
            f"<p>The text has {tokens:,} tokens and fits in one segment of {router.segment_length:,}: "
            "there was no cached memory to read.</p>"
        )
    return (
        router_figure(plots, router.gates, router.layers, router.segment_length, rest=router.rest)
        + f"<details><summary>The text that was read</summary><pre>{escape(router.text)}</pre></details>"
        + ("" if router.shares is None else _average(plots, router.shares, metrics))
    )


def _average(plots: Any, shares: RouterShares, metrics: list[dict[str, Any]]) -> str:
    """What is read of held-out text on average, while training and at the end."""
    names = [f"router_cached_share_layer_{layer}" for layer in shares.layers]
    measured = [line for line in metrics if all(math.isfinite(line.get(name, math.nan)) for name in names)]
    table = shares_table(shares)
    if len(measured) < 2:
        return table
    steps = np.array([line["step"] for line in measured])
    of_layers = np.array([[line[name] for name in names] for line in measured])
    first, last = of_layers.mean(axis=1)[[0, -1]]
    shown = responsive_picture(
        lambda theme, narrow: plots.router_while_training(
            steps, of_layers, shares.even_cached, theme, narrow=narrow
        ),
        plots,
        f"The share of the reading that cached memories get, from {first:.0%} at step {steps[0]:,} to "
        f"{last:.0%} at step {steps[-1]:,}; {shares.even_cached:.0%} if all memories were weighed alike",
        "While it was trained: how much of the reading of held-out text came from cached memories.",
    )
    return f'<div class="next">{shown}</div>{table}'


def shares_table(shares: RouterShares) -> str:
    """What routers read on average, a row a layer, and below what equal weights would be."""
    reading = shares.reading

    def row(name: str, cells: Sequence[str]) -> str:
        return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'

    rows = [
        row(
            str(layer),
            [
                f"{reading.cached[place].mean():.1%}",
                *(f"{share:.1%}" for share in reading.by_distance[place].mean(axis=0)),
                f"{reading.entropy[place].mean():.2f}",
                f"{reading.relative_entropy[place].mean():.0%}",
                f"{reading.cached[place].min():.0%} to {reading.cached[place].max():.0%}",
            ],
        )
        for place, layer in enumerate(shares.layers)
    ]
    even = [f"{shares.even_cached:.1%}", *(f"{share:.1%}" for share in shares.even_by_distance)]
    rows.append(row("all alike", [*even, "", "100%", ""]))
    ranges = [
        f"{first} back" if first == last else f"{first} to {last} back" for first, last in shares.distances
    ]
    names = ["layer", "cached memories", *ranges, "entropy, nats", "of equal", "heads"]
    columns = "".join(f'<th scope="col">{name}</th>' for name in names)
    caption = (
        f"Held-out text, mean over {shares.tokens:,} tokens that see at least one cached memory: the share "
        "of their reading that is of cached memories, and of those so many segments back; the entropy of a "
        "token's shares, and its part of that of equal ones; the least and the most that a head reads of "
        "cached memories. Last row: every memory weighed alike."
    )
    return (
        f'<div class="wide"><table class="numbers"><caption>{caption}</caption><thead><tr>{columns}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sample(sample: Sample) -> str:
    return (
        f'<pre class="sample"><span class="prompt">{escape(sample.prompt)}</span>{escape(sample.text)}</pre>'
        f'<p class="note">The prompt is shaded; the model wrote the rest ({escape(sample.sampling)}).</p>'
    )


_ON_THE_WAY = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}


def _training(plots: Any, metrics: list[dict[str, Any]]) -> list[str]:
    """The section on what else was written down at each step; none where nothing was."""
    curves, told = [], []
    for name, label in _ON_THE_WAY.items():
        lines = [line for line in metrics if math.isfinite(line.get(name, math.nan))]
        if lines:
            values = np.array([line[name] for line in lines], float)
            curves.append((label, np.array([line["step"] for line in lines]), values))
            told.append(f"{label} from {values.min():.3g} to {values.max():.3g}")
    if not curves:
        return []
    shown = responsive_picture(
        lambda theme, narrow: plots.training_curves(curves, theme, narrow=narrow),
        plots,
        f"Over the steps of training: {'; '.join(told)}",
        "At each step: the learning rate, the norm of the gradient before it is clipped, the speed.",
    )
    return [section("Training", shown)]


def _made(made: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in made.items()
    )
    return f'<div class="wide"><table class="made"><tbody>{rows}</tbody></table></div>'


def _settings(differences: dict[str, tuple[Any, Any]]) -> str:
    if not differences:
        return "<p>None: every field has its default.</p>"
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td><code>{escape(str(value))}</code></td>'
        f'<td class="default"><code>{escape(str(default))}</code></td></tr>'
        for name, (value, default) in differences.items()
    )
    return (
        '<div class="wide"><table><thead><tr><th scope="col">field</th><th scope="col">this run</th>'
        f'<th scope="col">default</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _stages(stages: Sequence[Change]) -> str:
    rows = "".join(
        f"<tr><td>{step:,}</td><td>{escape(began)}</td><td><code>{escape(name)}</code></td>"
        f"<td><code>{escape(str(old))}</code></td><td><code>{escape(str(new))}</code></td></tr>"
        for step, began, changed in stages
        for name, (old, new) in changed.items()
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("after step", "when", "field", "from", "to"))
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>'


def _commands(run_dir: epath.Path, prompt: str, has_held_out: bool, reads_cache: bool) -> str:
    run, prompt = shlex.quote(str(run_dir)), shlex.quote(prompt)
    # Where the program is, for who has not entered its environment: scripts/train has not.
    environment = os.path.relpath(sys.prefix) if sys.prefix.startswith(os.getcwd()) else sys.prefix
    measure = f"mc-jax eval {run}" + ("" if has_held_out else " --text FILE")
    text = "held-out text again" if has_held_out else "a text of yours"
    without = (
        "Without its cached memories, to see what they are worth:",
        f"{measure} --model.aggregation none",
    )
    commands = [
        ("In the environment that trained it:", f"source {shlex.quote(environment)}/bin/activate"),
        (f"Measure it on {text}:", measure),
        *([without] if reads_cache else []),
        ("Let it write:", f"mc-jax generate {run} --prompt {prompt}"),
    ]
    return "".join(f"<p>{text}</p><pre><code>{escape(command)}</code></pre>" for text, command in commands)

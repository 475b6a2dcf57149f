"""The page of a comparison: results beside settings, curves over three axes, what the routers read."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mc_jax.evaluation import _comparison_plots as drawings
from mc_jax.evaluation import _plots
from mc_jax.evaluation._comparison_plots import Curve, Panel
from mc_jax.evaluation._page import escape, page, responsive_picture, section
from mc_jax.evaluation.comparison import ComparedRun, caveats, measured_alike, seeds_of
from mc_jax.training.router_shares import distances_to

_AXES = {"step": "optimizer steps", "tokens": "tokens", "seconds": "time"}
_HOUR, _MINUTE = 3600.0, 60.0


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


type _Columns = dict[str, tuple[str, Callable[[Any], str]]]
# Heading and format of each value.
_RESULTS: _Columns = {
    "held_out_bits_per_byte": ("bits per byte", "{:.4f}".format),
    "held_out_perplexity": ("perplexity", "{:,.2f}".format),
    "held_out_loss": ("loss", "{:.4f}".format),
}
_TRAINING: _Columns = {
    "training_loss": ("loss", "{:.4f}".format),
    "step": ("steps", "{:,}".format),
    "tokens": ("tokens", "{:,}".format),
    "seconds": ("time", _duration),
    "parameters": ("parameters", "{:,}".format),
}
_BORDERS = ("solid", "dashed", "dotted")


def comparison_page(runs: Sequence[ComparedRun], differing: Mapping[str, Sequence[Any]]) -> str:
    """The page as HTML text, which needs no other file.

    Args:
      runs: two or more.
      differing: the settings that differ, each with a value a run.
    """
    sections = [
        section("Results", _results(runs, differing)),
        section("Loss while training", _losses(runs)),
        section("What the routers read", _routers(runs)),
        section("How they were trained", _commands(runs)),
    ]
    return page(f"{len(runs)} runs compared", "Memory Caching", sections, _style(len(runs)))


def _results(runs: Sequence[ComparedRun], differing: Mapping[str, Sequence[Any]]) -> str:
    values = [run.values() for run in runs]
    measured = [
        (place, of_run["held_out_bits_per_byte"], of_run.get("held_out_bits_per_byte_standard_error"))
        for place, of_run in enumerate(values)
        if "held_out_bits_per_byte" in of_run
    ]
    picture, lead = "", "<p>No run has been measured on held-out text at its end yet.</p>"
    if measured:
        lead = _lead(runs, [(bits, place) for place, bits, _ in measured])
        caption = "Bits per byte of the held-out text, at the end of each run: fewer are better."
        if any(error is not None for *_, error in measured):
            caption += " Bars: one standard error."
        picture = responsive_picture(
            lambda theme, narrow: drawings.results(
                [runs[place].name for place, *_ in measured],
                measured,
                "bits per byte, held-out",
                theme,
                narrow,
            ),
            _plots,
            "; ".join(f"{runs[place].name} {value:.4f} bits per byte" for place, value, _ in measured),
            caption,
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in caveats(runs))
    return lead + picture + _table(runs, values, differing) + _seeds(runs) + notes


def _lead(runs: Sequence[ComparedRun], measured: Sequence[tuple[float, int]]) -> str:
    """Which run is best, where that can be told."""
    if not measured_alike(runs).text or len(measured) < 2:
        return ""
    (best, first), (next_best, second), *_ = sorted(measured)
    return (
        f"<p>Fewest bits per byte on held-out text: <strong>{escape(runs[first].name)}</strong>, {best:.4f}, "
        f"{next_best - best:.4f} fewer than {escape(runs[second].name)}.</p>"
    )


def _seeds(runs: Sequence[ComparedRun]) -> str:
    """A row for each setting of several seeds, if there are some."""

    def names(places: Sequence[int]) -> str:
        return " ".join(_swatch(place) + escape(runs[place].name) for place in places)

    rows = "".join(
        f'<tr><th scope="row">{names(group.runs)}</th>'
        f"<td>{len(group.runs)}</td><td>{group.mean:.4f} ± {group.standard_error:.4f}</td></tr>"
        for group in seeds_of(runs)
    )
    return rows and (
        '<div class="wide"><table class="numbers compared seeds"><caption>Runs that differ by their seed '
        "alone: mean bits per byte, and its standard error over seeds</caption><thead><tr>"
        '<th scope="col">runs</th><th scope="col">seeds</th><th scope="col">bits per byte</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _table(
    runs: Sequence[ComparedRun],
    values: Sequence[Mapping[str, Any]],
    differing: Mapping[str, Sequence[Any]],
) -> str:
    """A row a run: the settings that differ, then how it ended; the best result of a column is strong."""
    same = measured_alike(runs)
    comparable = [name for name in _RESULTS if same.tokenizer or name == "held_out_bits_per_byte"]
    best = {
        name: min(found)
        for name in (comparable if same.text else [])
        if len(found := [of_run[name] for of_run in values if name in of_run]) > 1
    }

    def cell(name: str, of_run: Mapping[str, Any]) -> str:
        if name not in of_run:
            return "<td>–</td>"
        error = of_run.get(f"{name}_standard_error")
        text = {**_RESULTS, **_TRAINING}[name][1](of_run[name]) + ("" if error is None else f" ± {error:.4f}")
        return f'<td class="best">{text}</td>' if best.get(name) == of_run[name] else f"<td>{text}</td>"

    rows = "".join(
        f'<tr><th scope="row">{_swatch(place)}{escape(run.name)}</th>'
        + "".join(cell(name, of_run) for name in _RESULTS)
        + "".join(f"<td><code>{escape(_setting(given[place]))}</code></td>" for given in differing.values())
        + "".join(cell(name, of_run) for name in _TRAINING)
        + "</tr>"
        for place, (run, of_run) in enumerate(zip(runs, values, strict=True))
    )
    settings = "".join(
        f'<th scope="col"><code>{escape(name).replace(".", ".<wbr>")}</code></th>' for name in differing
    )
    results, training = (
        "".join(f'<th scope="col">{title}</th>' for title, _ in columns.values())
        for columns in (_RESULTS, _TRAINING)
    )
    over = f'<th colspan="{len(differing)}" scope="colgroup">settings that differ</th>' if differing else ""
    return (
        '<div class="wide"><table class="numbers compared"><thead>'
        f'<tr><td></td><th colspan="{len(_RESULTS)}" scope="colgroup">held-out text, at the end</th>{over}'
        f'<th colspan="{len(_TRAINING)}" scope="colgroup">training</th></tr>'
        f'<tr><th scope="col">run</th>{results}{settings}{training}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _losses(runs: Sequence[ComparedRun]) -> str:
    """A tab for each axis; losses of training steps, and those on held-out text where some were measured."""
    tabs = []
    for axis, label in _AXES.items():
        scale, label = _time_scale(runs) if axis == "seconds" else (1.0, label)
        shown = []
        for name, title in (("loss", "Training"), ("held_out_loss", "Held-out")):
            curves = _curves(runs, axis, name, scale)
            if curves:
                shown.append(
                    Panel(
                        title=title,
                        curves=curves,
                        x_label=label,
                        y_label="nats per token",
                        logarithmic=True,
                        smoothed=name == "loss",
                        dots=name != "loss",
                    )
                )
        if not shown:
            return "<p>No run has a step with a finite loss yet.</p>"
        caption = "Running means of the training loss"
        caption += ", and the loss on held-out text measured on the way." if len(shown) > 1 else "."
        tabs.append((axis, _AXES[axis], _panels(shown, f"Loss of each run over {_AXES[axis]}", caption)))
    inputs = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked" if not place else ""}>'
        f'<label for="axis-{axis}">{label}</label>'
        for place, (axis, label, _) in enumerate(tabs)
    )
    contents = "".join(f"<div>{content}</div>" for *_, content in tabs)
    return f'{_legend(runs, set(range(len(runs))))}<div class="tabs">{inputs}{contents}</div>'


def _routers(runs: Sequence[ComparedRun]) -> str:
    shown = []
    curves = _curves(runs, "step", "router_cached_share", 1.0)
    if curves:
        title = "Cached memories' share, while training"
        shown.append(Panel(title=title, curves=curves, x_label=_AXES["step"], dots=True, percent=True))
    found = {place: router for place, run in enumerate(runs) if (router := run.result.get("router"))}
    if found:
        shown.append(_by_distance(found))
    if not shown:
        return "<p>No run has a router whose reading was measured.</p>"
    caption = (
        "Mean over layers, heads and held-out tokens that see at least one cached memory: the share of the "
        "reading that comes from cached memories, and how it divides by how many segments these lie back."
    )
    even = {_even(router) for router in found.values()}
    if len(even) == 1:
        caption += " Dotted grey: every memory weighed alike."
    pictures = _panels(shown, "Shares of the reading that come from cached memories, by run", caption)
    legend = _legend(runs, {curve.run for panel in shown for curve in panel.curves})
    return legend + pictures + _router_table(runs, found)


def _even(router: Mapping[str, Any]) -> tuple[float, ...]:
    """What equal weights would read in each range of distance, which tells runs of one layout from others."""
    return tuple(router["even_share_by_distance"])


def _by_distance(found: Mapping[int, Mapping[str, Any]]) -> Panel:
    ranges = distances_to(max(router["distances"][-1][1] for router in found.values()))
    even = {_even(router) for router in found.values()}
    curves = [
        Curve(run=place, x=np.arange(len(shares)), y=shares)
        for place, router in found.items()
        for shares in [np.mean([layer["share_by_distance"] for layer in router["layers"]], axis=0)]
    ]
    return Panel(
        title="By distance, at the end",
        curves=curves,
        x_label="segments back",
        ticks=[str(first) if first == last else f"{first}–{last}" for first, last in ranges],
        dots=True,
        percent=True,
        even=np.array(next(iter(even))) if len(even) == 1 else None,
    )


def _router_table(runs: Sequence[ComparedRun], found: Mapping[int, Mapping[str, Any]]) -> str:
    if not found:
        return ""
    numbers = sorted({layer["layer"] for router in found.values() for layer in router["layers"]})
    rows = []
    for place, router in found.items():
        layers = {layer["layer"]: layer for layer in router["layers"]}
        means = {
            name: float(np.mean([layer[name] for layer in layers.values()]))
            for name in ("cached_share", "entropy", "relative_entropy")
        }
        cells = [
            f"{means['cached_share']:.1%}",
            f"{router['even_cached_share']:.1%}",
            f"{means['entropy']:.2f}",
            f"{means['relative_entropy']:.0%}",
            *(f"{layers[one]['cached_share']:.1%}" if one in layers else "–" for one in numbers),
        ]
        name = f'<th scope="row">{_swatch(place)}{escape(runs[place].name)}</th>'
        rows.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ["run", "cached memories", "all alike", "entropy, nats", "of equal"]
    columns = "".join(f'<th scope="col">{name}</th>' for name in [*names, *(f"layer {n}" for n in numbers)])
    return (
        '<div class="wide"><table class="numbers compared"><caption>At the end: the share of cached memories '
        "and what it would be if all memories were weighed alike, the entropy of a token's shares and its "
        "part of that of equal ones, and the share in each layer</caption>"
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _commands(runs: Sequence[ComparedRun]) -> str:
    trained = "".join(
        f"<p>{_swatch(place)}{escape(run.name)}</p><pre><code>{escape(command)}</code></pre>"
        for place, run in enumerate(runs)
        if (command := run.result.get("command"))
    )
    again = shlex.join(["mc-jax", "compare", *(str(run.folder) for run in runs), "--output", "compare.html"])
    return f"{trained}<p>This page, written anew:</p><pre><code>{escape(again)}</code></pre>"


def _curves(runs: Sequence[ComparedRun], axis: str, name: str, scale: float) -> list[Curve]:
    """What runs have of a quantity, where it and the axis are finite."""
    curves = []
    for place, run in enumerate(runs):
        points = [
            (line[axis] * scale, line[name])
            for line in run.metrics
            if math.isfinite(line.get(axis, math.nan)) and math.isfinite(line.get(name, math.nan))
        ]
        if points:
            x, y = np.array(points, float).T
            curves.append(Curve(run=place, x=x, y=y))
    return curves


def _panels(shown: Sequence[Panel], alternative: str, caption: str) -> str:
    return responsive_picture(
        lambda theme, narrow: drawings.panels(shown, theme, narrow), _plots, alternative, caption
    )


def _time_scale(runs: Sequence[ComparedRun]) -> tuple[float, str]:
    """From seconds to a unit in which the longest run has few digits."""
    longest = max((run.values().get("seconds", 0.0) for run in runs), default=0.0)
    for unit, name in ((_HOUR, "hours"), (_MINUTE, "minutes")):
        if longest > 2 * unit:
            return 1 / unit, f"{name} of training"
    return 1.0, "seconds of training"


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _legend(runs: Sequence[ComparedRun], shown: set[int]) -> str:
    names = "".join(f"<li>{_swatch(place)}{escape(runs[place].name)}</li>" for place in sorted(shown))
    return f'<ul class="legend">{names}</ul>'


def _swatch(place: int) -> str:
    return f'<span class="swatch run-{place}"></span>'


def _style(runs: int) -> str:
    """The runs' colours, light and dark, and the dashes of their lines."""

    def colours(theme: _plots.Theme) -> str:
        return "".join(
            f".run-{place} {{ border-color: {drawings.colour_of(place, theme)}; }}\n" for place in range(runs)
        )

    each = len(_plots.LIGHT.runs)
    dashes = "".join(
        f".run-{place} {{ border-top-style: {_BORDERS[place // each % len(_BORDERS)]}; }}\n"
        for place in range(each, runs)
    )
    dark = f"@media (prefers-color-scheme: dark) {{\n{colours(_plots.DARK)}}}\n"
    return _STYLE + colours(_plots.LIGHT) + dark + dashes


_STYLE = """
.swatch { display: inline-block; width: 1.4rem; border-top: 3px solid; vertical-align: middle;
  margin-right: 0.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem; margin: 0 0 1rem; padding: 0; list-style: none;
  font-size: 0.9rem; overflow-wrap: anywhere; }
main { max-width: 72rem; }
.compared { margin: 1.25rem 0 0.75rem; white-space: nowrap; }
.compared td, .compared thead th { padding-left: 1.1rem; }
.best { font-weight: 650; }
.compared tr > :first-child { position: sticky; left: 0; padding: 0.35rem 0.5rem 0.35rem 0; max-width: 20rem;
  background: var(--page); overflow: hidden; text-overflow: ellipsis; }
.compared th[scope=colgroup] { text-align: center; border-left: 1px solid var(--edge); }
.compared thead code, .compared caption { white-space: normal; }
.compared caption { position: sticky; left: 0; max-width: min(46rem, 100vw - 3rem); }
@media (max-width: 40rem) { .compared tr > :first-child { max-width: 9rem; } }
.compared.seeds tr > :first-child { max-width: none; white-space: normal; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; padding: 0.3rem 0.9rem; margin: 0 0.25rem 1rem 0; cursor: pointer;
  border: 1px solid var(--edge); border-radius: 2rem; font-size: 0.875rem; color: var(--muted); }
.tabs > input:checked + label { background: var(--panel); color: var(--ink); border-color: var(--muted); }
.tabs > input:focus-visible + label { outline: 2px solid var(--ink); outline-offset: 2px; }
.tabs > div { display: none; }
.tabs > input:nth-of-type(1):checked ~ div:nth-of-type(1),
.tabs > input:nth-of-type(2):checked ~ div:nth-of-type(2),
.tabs > input:nth-of-type(3):checked ~ div:nth-of-type(3) { display: block; }
"""

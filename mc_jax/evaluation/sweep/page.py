"""The dial's page: quality against memory and work, by context and position, and every measurement."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_jax.evaluation import _comparison_plots, _plots
from mc_jax.evaluation._page import escape, page, responsive_picture, section
from mc_jax.evaluation.sweep import _drawings as drawings
from mc_jax.evaluation.sweep import _script
from mc_jax.evaluation.sweep.table import shown
from mc_jax.evaluation.sweep.view import (
    Row,
    View,
    bytes_in_words,
    full_name,
    label_of,
    series_name,
    series_of,
    views_of,
)

_COLUMNS = {
    "bits_per_byte": "bits per byte",
    "less_own_bits_per_byte": "difference to trained",
    "memory_bytes": "memory",
    "stored_bytes": "memory, as stored",
    "flops_per_token": "FLOPs a token",
    "microseconds_per_token": "µs a token",
    "router_cached_share": "cached share",
    "perplexity": "perplexity",
}
_SETTINGS = {
    "run": "run",
    "mode": "mode",
    "context_length": "context",
    "aggregation": "aggregation",
    "segment_length": "segment",
    "top_k": "top k",
    "segmentation": "segmentation",
    "max_cached": "places",
    "state_dtype": "numbers",
}


def dial_page(results: Sequence[Mapping[str, Any]], rows: Sequence[Row], told: Mapping[str, Any]) -> str:
    """The page as HTML text, which needs no other file.

    Args:
      results: as `measure_cell` made them; at least one.
      rows: of `rows_of`, one a result.
      told: "command" of the sweep, "left_out" and "failed", as lists of sentences.
    """
    views = views_of(rows, [values["costs"] for values in results])
    runs = list(dict.fromkeys(Path(row["run"]).name for row in rows))
    sections = [
        _lead(rows, views),
        section("Quality against memory", _legend(rows) + _against_memory(views)),
        section("Quality against work", _legend(rows) + _against_work(views)),
        _by_context(rows),
        _by_position(results, rows),
        _routers(results, rows),
        section("Every measurement", _table(rows)),
        section("How it was measured", _how(results, rows, told)),
        f"<script>{_script.SCRIPT}</script>",
    ]
    title = f"The capacity dial of {runs[0]}" if len(runs) == 1 else f"The capacity dial of {len(runs)} runs"
    return page(title, "Memory Caching", [part for part in sections if part], _style(len(series_of(rows))))


def _lead(rows: Sequence[Row], views: Sequence[View]) -> str:
    """What the dial's ends are and what lies between them, of the first view that has the run as trained."""
    view, own = next(
        ((view, point.row) for view in views for point in view.points if point.row["is_own"]), (None, None)
    )
    if view is None or own is None:
        return ""
    value, _, error = shown(own, "bits_per_byte").partition(" ")
    how = f"{error}, as trained: {full_name(own, rows)}, {view.title}"
    figures = [(value, "bits per byte", how.removeprefix(", "))]
    off = next(
        (p.row for p in view.points if p.row["run"] == own["run"] and p.row["aggregation"] == "none"), None
    )
    if off is not None and off is not own:
        value, _, error = shown(off, "less_own_bits_per_byte").partition(" ")
        figures.append((value, "bits per byte", f"{error}, with its caches off".removeprefix(", ")))
    figures.append((bytes_in_words(own["memory_bytes"]), "of memory a sequence", "as trained"))
    attention = view.ends["attention"]["memory_bytes"]
    figures.append(
        (bytes_in_words(attention), "for a transformer's KV cache", "as wide, as deep, the same tokens")
    )
    if "recurrence" in view.ends:
        least = view.ends["recurrence"]["memory_bytes"]
        figures.append((bytes_in_words(least), "for the plain recurrence", "its caches off"))
    cards = "".join(
        f'<div class="figure"><dt>{escape(what)}<span>{escape(note)}</span></dt>'
        f"<dd>{escape(value)}</dd></div>"
        for value, what, note in figures
    )
    return (
        f'<section><dl class="figures">{cards}</dl><p>The same weights, read in many ways. Between a '
        "recurrence, whose memory never grows, and attention, which keeps every token, lies a dial: how "
        "often the memory is cached, in what form, how many cached memories a token reads, and how.</p>"
        "</section>"
    )


def _against_memory(views: Sequence[View]) -> str:
    caption = (
        "Lower is better, further left is smaller. The line joins the ways than which none is at once as "
        "small and better; their names say how the text is read. Ringed: as trained. Bars: one standard "
        "error of the difference to that, paired. Dotted: what the dial's two ends keep, the run with its "
        "caches off, and a transformer's KV cache as wide and deep at this length. Bytes are by formula; the "
        "table has what this program stores."
    )
    return _picture(
        lambda theme, narrow: drawings.scatter(views, (drawings.MEMORY,), theme, narrow),
        _said(views, "memory_bytes", lambda value: f"{bytes_in_words(value)}"),
        caption,
    )


def _against_work(views: Sequence[View]) -> str:
    caption = (
        "First: what the mathematics asks for, forward, of the mean token. Then: what it took here, "
        "compiling left out, for each scored token (overlapping windows read some twice); it changes with "
        "the machine and with what else that does. Dotted: the dial's two ends."
    )
    return _picture(
        lambda theme, narrow: drawings.scatter(views, (drawings.FLOPS, drawings.TIME), theme, narrow),
        _said(views, "flops_per_token", lambda value: f"{value:,.0f} FLOPs a token"),
        caption,
    )


def _said(views: Sequence[View], column: str, words: Callable[[float], str]) -> str:
    rows = [point.row for view in views for point in view.points]
    return "; ".join(
        f"{view.title}: {full_name(point.row, rows)} {point.row['bits_per_byte']:.4f} bits per byte at "
        f"{words(point.row[column])}"
        for view in views
        for point in view.points
    )


def _by_context(rows: Sequence[Row]) -> str:
    """Bits per byte over context length, for each mode with several."""
    panels = []
    for mode, title in (("last-k", "The same last tokens"), ("windows", "All tokens, overlapping windows")):
        found: dict[str, list[Row]] = {}
        for row in rows:
            if row["mode"] == mode:
                found.setdefault(full_name(row, rows), []).append(row)
        several = {name: some for name, some in found.items() if len({r["context_length"] for r in some}) > 1}
        if several:
            lines = _lines(
                rows,
                [
                    (
                        some[0],
                        np.array(sorted((r["context_length"], r["bits_per_byte"]) for r in some), float),
                    )
                    for some in several.values()
                ],
            )
            panels.append(
                drawings.Panel(title=title, lines=lines, x_label="context, tokens", y_label="bits per byte")
            )
    if not panels:
        return ""
    caption = (
        "A line for each way to read; lines of one colour differ in what the table tells. Windows mix tokens "
        "with little and with much context; the last tokens of windows all have a long one."
    )
    drawn = _picture(
        lambda theme, narrow: drawings.lines(panels, theme, narrow),
        "Bits per byte by context length",
        caption,
    )
    read = [row for row in rows if row["mode"] in ("last-k", "windows")]
    return section("Loss by context length", _legend(rows, read) + drawn)


def _by_position(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Bits per byte by position, and how much more it is there than as trained."""
    curves, less = [], []
    own = {
        row["run"]: {bucket["from"]: bucket for bucket in values["measurement"]["by_position"]}
        for row, values in zip(rows, results, strict=True)
        if row["is_own"] and row["mode"] == "by-position"
    }
    for row, values in zip(rows, results, strict=True):
        if row["mode"] != "by-position":
            continue
        buckets = [(b["to"] + 1, b) for b in values["measurement"]["by_position"]]
        finite = [(x, b) for x, b in buckets if b["bits_per_byte"] is not None]
        curves.append((row, np.array([(x, b["bits_per_byte"]) for x, b in finite])))
        base = own.get(row["run"], {})
        differences = [
            (x, b["bits_per_byte"] - base[b["from"]]["bits_per_byte"])
            for x, b in finite
            if b["from"] in base and base[b["from"]]["to"] == b["to"]
        ]
        if differences and not row["is_own"]:
            less.append((row, np.array(differences)))
    if not curves:
        return ""
    panels = [
        drawings.Panel(
            title="By tokens read before",
            lines=_lines(rows, curves),
            x_label="position in the window, up to",
            y_label="bits per byte",
        )
    ]
    if less:
        panels.append(
            drawings.Panel(
                title="More than as trained",
                lines=_lines(rows, less),
                x_label="position in the window, up to",
                y_label="bits per byte",
                from_zero=True,
            )
        )
    caption = (
        "Windows side by side; a point is all targets up to a position and after the point before it. First: "
        "every way to read. Then: how much more each is than the run as trained."
    )
    drawn = _picture(
        lambda theme, narrow: drawings.lines(panels, theme, narrow), "Bits per byte by position", caption
    )
    return section("Loss by position", _legend(rows, [row for row, _ in curves]) + drawn)


def _lines(rows: Sequence[Row], curves: Sequence[tuple[Row, np.ndarray]]) -> list[drawings.Line]:
    series = series_of(rows)
    seen: dict[str, int] = {}
    found = []
    for row, points in curves:
        name = series_name(row, rows)
        seen[name] = seen.get(name, -1) + 1
        found.append(
            drawings.Line(
                series=series.index(name),
                dash=seen[name],
                label=label_of(row, rows),
                x=points[:, 0],
                y=points[:, 1],
            )
        )
    return found


def _routers(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """What the routers read, once for each way to read, whatever the mode."""
    found: dict[tuple[str, Any], Mapping[str, Any]] = {}
    for row, values in zip(rows, results, strict=True):
        if values["router"] is not None and values["router"] not in found.values():
            length = row["context_length"] or "trained"
            found.setdefault((full_name(row, rows), length), values["router"])
    if not found:
        return ""
    numbers = sorted({layer["layer"] for router in found.values() for layer in router["layers"]})
    lines = []
    for (name, length), router in found.items():
        layers = {layer["layer"]: layer for layer in router["layers"]}
        mean = sum(layer["cached_share"] for layer in layers.values()) / len(layers)
        entropy = sum(layer["relative_entropy"] for layer in layers.values()) / len(layers)
        context = f"{length:,}" if isinstance(length, int) else length
        cells = [context, f"{mean:.1%}", f"{router['even_cached_share']:.1%}", f"{entropy:.0%}"]
        cells += [f"{layers[number]['cached_share']:.1%}" if number in layers else "–" for number in numbers]
        lines.append(
            f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    heads = ["context", "cached memories", "all alike", "entropy, of equal"]
    names = [f'<th scope="col">{name}</th>' for name in [*heads, *(f"layer {n}" for n in numbers)]]
    text = (
        "<p>The share of the reading that comes from cached memories, beside what it would be if every "
        "memory were weighed alike. A share near zero means that the caches are paid for and not read.</p>"
    )
    table = (
        '<div class="wide"><table class="numbers narrow-first"><thead><tr><th scope="col">read as</th>'
        f"{''.join(names)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    return section("What the routers read", text + table)


def _table(rows: Sequence[Row]) -> str:
    """All cells; settings that never differ are left out, but for the aggregation."""
    settings = [
        name
        for name in _SETTINGS
        if len({row[name] for row in rows}) > 1 or (name == "aggregation" and rows[0][name] is not None)
    ]
    figures = [name for name in _COLUMNS if any(row[name] is not None for row in rows)]
    names = {**{name: _SETTINGS[name] for name in settings}, **{name: _COLUMNS[name] for name in figures}}
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names.values())
    lines = []
    for row in rows:
        cells = []
        for name in names:
            value = "" if row[name] is None else escape(str(row[name]))
            text = bytes_in_words(row[name]) if name.endswith("_bytes") and value else shown(row, name)
            cells.append(f'<td data-value="{value}">{escape(text)}</td>')
        words = " ".join(str(row[name]) for name in _SETTINGS if row[name] is not None)
        words += " as-trained" if row["is_own"] else ""
        command = (
            "<td><details><summary>command</summary>"
            f"<pre><code>{escape(row['command'])}</code></pre></details></td>"
        )
        mark = ' class="own"' if row["is_own"] else ""
        lines.append(f'<tr{mark} data-words="{escape(words.lower())}">{"".join(cells)}{command}</tr>')
    return (
        '<p class="tools"><input id="filter" type="search" placeholder="filter, for example: sparse 64" '
        'aria-label="Filter the table"><output></output></p>'
        '<div class="wide"><table class="numbers cells" data-filter="filter"><thead><tr>'
        f'{head}<th scope="col">how</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        '<p class="note">A heading sorts. ± is one standard error; of differences, that of the pairs. Bold: '
        "as trained. The command measures that row alone.</p>"
    )


def _how(results: Sequence[Mapping[str, Any]], rows: Sequence[Row], told: Mapping[str, Any]) -> str:
    first = results[0]
    facts = {
        "scored tokens": f"{rows[0]['tokens']:,}",
        "bytes of text": f"{rows[0]['bytes']:,}",
        "errors over": first["measurement"]["standard_error_over"],
        "device": f"{first['devices']} × {first['device']}",
        "text, SHA-256": str(rows[0]["text_hash"])[:16],
        **{
            f"weights of {Path(row['run']).name}, step {row['step']}": str(row["checkpoint_hash"])[:16]
            for row in rows
        },
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()
    )
    parts = [f'<dl class="facts">{listed}</dl>', '<p class="next">This page, written anew:</p>']
    parts.append(f"<pre><code>{escape(told['command'])}</code></pre>")
    for title, sentences in (("Without a result", told["failed"]), ("Left out", told["left_out"])):
        if sentences:
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            parts.append(f"<p>{title}:</p><ul>{items}</ul>")
    return "".join(parts)


def _picture(draw: Callable[[Any, bool], str], alternative: str, caption: str) -> str:
    return responsive_picture(draw, _plots, alternative, caption)


def _legend(rows: Sequence[Row], read: Sequence[Row] | None = None) -> str:
    """The names of the series, or of those that some rows belong to."""
    there = {series_name(row, rows) for row in (rows if read is None else read)}
    names = "".join(
        f'<li><span class="dot series-{place}"></span>{escape(name)}</li>'
        for place, name in enumerate(series_of(rows))
        if name in there
    )
    return f'<ul class="legend">{names}</ul>'


def _style(series: int) -> str:
    """The series' colours, light and dark."""

    def colours(theme: _plots.Theme) -> str:
        return "".join(
            f".series-{place} {{ background: {_comparison_plots.colour_of(place, theme)}; }}\n"
            for place in range(series)
        )

    dark = f"@media (prefers-color-scheme: dark) {{\n{colours(_plots.DARK)}}}\n"
    return _STYLE + _script.STYLE + colours(_plots.LIGHT) + dark


_STYLE = """
main { max-width: 72rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem; margin: 0 0 1rem; padding: 0; list-style: none;
  font-size: 0.9rem; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 50%; margin-right: 0.5rem; }
.numbers.cells, .narrow-first { white-space: nowrap; }
.numbers.cells td, .numbers.cells thead th { padding: 0.35rem 1.4rem 0.35rem 0; text-align: right; }
.narrow-first tr > :first-child { white-space: normal; min-width: 8rem; }
tr.own td { font-weight: 650; }
ul { padding-left: 1.2rem; overflow-wrap: anywhere; }
.facts dd { overflow-wrap: anywhere; }
"""

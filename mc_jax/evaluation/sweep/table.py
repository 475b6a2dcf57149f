"""A sweep's results as one tidy row a measurement: CSV, JSON, and a table to read."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mc_jax.data.files import json_text, write_text
from mc_jax.evaluation.sums import difference
from mc_jax.evaluation.sweep.cell import sums_of
from mc_jax.evaluation.sweep.runner import Outcome

_SETTINGS = (
    "aggregation",
    "segment_length",
    "top_k",
    "segmentation",
    "context_length",
    "stride",
    "last_k",
    "first",
    "max_cached",
    "when_full",
    "state_dtype",
)
_FIGURES = ("bits_per_byte", "loss", "perplexity", "word_perplexity")
_COUNTS = ("tokens", "bytes", "words", "documents")
_MARKDOWN = {
    "run": "run",
    "mode": "mode",
    "aggregation": "aggregation",
    "segment_length": "segment",
    "top_k": "top k",
    "context_length": "context",
    "max_cached": "places",
    "state_dtype": "numbers",
    "bits_per_byte": "bits per byte",
    "less_own_bits_per_byte": "difference to trained",
    "memory_bytes": "bytes of memory",
    "flops_per_token": "FLOPs per token",
    "microseconds_per_token": "µs per token",
    "router_cached_share": "cached share",
}


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """A row a measurement, all with the same columns; None where a setting or figure is not one of it.

    `less_own_*` is the paired difference to the run as it was trained, in the same mode on the same targets.
    """
    own = {
        (values["run"], values["settings"]["mode"]): sums_of(values)
        for values in outcome.results
        if values["is_own"]
    }
    rows = []
    for values in outcome.results:
        measured, settings = values["measurement"], values["settings"]
        row: dict[str, Any] = {"run": values["run"], "step": values["step"], "mode": settings["mode"]}
        row |= {name: settings.get(name) for name in _SETTINGS}
        row["is_own"] = values["is_own"]
        for name in _FIGURES:
            row[name] = measured[name]
            row[f"{name}_standard_error"] = measured.get(f"{name}_standard_error")
        base = own.get((values["run"], settings["mode"]))
        less = {} if base is None or values["is_own"] else difference(sums_of(values), base)
        for name in ("bits_per_byte", "loss"):
            found = less.get(name)
            row[f"less_own_{name}"] = None if found is None else found.value
            row[f"less_own_{name}_standard_error"] = None if found is None else found.standard_error
        row |= {name: measured[name] for name in _COUNTS}
        row |= values["costs"]["cell"]
        row["stored_bytes"] = measured["cache_bytes"]
        row["seconds"] = measured["seconds"]
        row["microseconds_per_token"] = 1e6 * measured["seconds"] / measured["tokens"]
        row["first_batch_seconds"] = values["first_batch_seconds"]
        row |= _router(values["router"])
        row |= {f"{name}_hash": measured["hashes"][name] for name in ("checkpoint", "tokenizer", "text")}
        rows.append(row | {"command": values["command"]})
    return rows


def _router(router: Mapping[str, Any] | None) -> dict[str, float | None]:
    names = ("cached_share", "entropy", "relative_entropy")
    if router is None:
        return {f"router_{name}": None for name in names}
    layers = router["layers"]
    return {f"router_{name}": sum(layer[name] for layer in layers) / len(layers) for name in names}


def write_tables(
    rows: Sequence[Mapping[str, Any]], outcome: Outcome, told: Mapping[str, Any], folder: Path
) -> None:
    """Write results.csv, results.json and results.md, each whole or not at all.

    Args:
      rows: of `rows_of`.
      outcome: what they were made of: by position, routers, and what failed stand in the JSON.
      told: what else the JSON says of the sweep.
      folder: where.
    """
    write_text(folder / "results.csv", _csv(rows))
    whole = [
        {
            **row,
            "by_position": values["measurement"].get("by_position"),
            "router": values["router"],
            "costs": values["costs"],
        }
        for row, values in zip(rows, outcome.results, strict=True)
    ]
    failed = [
        {"run": cell.run, "settings": cell.settings(), "error": error} for cell, error in outcome.failed
    ]
    write_text(
        folder / "results.json", json_text({**told, "failed": failed, "results": whole}, indent=2) + "\n"
    )
    write_text(folder / "results.md", _markdown(rows))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: "" if value is None else value for name, value in row.items()} for row in rows
        )
    return text.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The columns that say something, with standard errors beside the figures."""
    names = [name for name in _MARKDOWN if any(row[name] is not None for row in rows)]
    lines = [
        "| " + " | ".join(_MARKDOWN[name] for name in names) + " |",
        "|" + "---|" * len(names),
    ]
    for row in rows:
        lines.append("| " + " | ".join(shown(row, name).replace("|", "\\|") for name in names) + " |")
    return "\n".join(lines) + "\n"


def shown(row: Mapping[str, Any], name: str) -> str:
    """A value of a row as text, with its standard error where it has one."""
    value = row[name]
    if value is None:
        return "–"
    if name == "router_cached_share":
        return f"{value:.1%}"
    if name in ("flops_per_token", "microseconds_per_token"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if isinstance(value, float):
        sign = "+" if name.startswith("less_own") else ""
        error = row.get(f"{name}_standard_error")
        return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
    return f"{value:,}" if isinstance(value, int) else str(value)

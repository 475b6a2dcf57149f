"""The table of a study: means over seeds with their spread, differences paired by seed, by position."""

import collections
import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.studies import Training
from mc_jax.data.files import write_text
from mc_jax.evaluation.result import RESULT_FILE

_TURNED = (
    "aggregation",
    "segment_length",
    "top_k",
    "segmentation",
    "context_length",
    "max_cached",
    "state_dtype",
)
_AS_TRAINED = "as trained"
RESULTS = Path("dial", "results.json")
"""What a sweep found, in a study's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A variant read in one way."""

    variant: str
    """The variant's name."""
    reading: str
    """What is turned; "as trained" if nothing is."""
    mode: str
    """The mode in which the text was read."""
    figures: Mapping[int, float]
    """Bits per byte by seed."""
    own: Mapping[int, float]
    """Figures of the variant read as it was trained."""
    base: Mapping[int, float]
    """Figures of the first variant, read as it was trained."""
    by_position: Mapping[tuple[int, int], Mapping[int, float]]
    """Bits per byte by the first position of a bucket and the last one, then by seed."""
    parameters: tuple[int, ...]
    """The model's numbers of parameters, those that differ between seeds each once."""
    tokens: tuple[int, ...]
    """The numbers of tokens that it was trained on, likewise."""
    minutes: float
    """Minutes of a training, the mean over seeds."""


def write_table(variants: Sequence[str], trained: Sequence[Training], folder: Path, *, command: str) -> Path:
    """Write study.csv, a row a measurement, and study.md, a line a variant and reading.

    Args:
      variants: names, in the order of the lines; the first is what the others are compared with.
      trained: the runs, all of which are in the dial's results.
      folder: the study's, whose `dial` has the results.
      command: what makes the table anew.

    Returns:
      Where study.md is.
    """
    rows = _rows(trained, folder)
    text = io.StringIO()
    names = [name for name in rows[0] if name != "by_position"]
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "study.csv", text.getvalue())
    path = folder / "study.md"
    write_text(path, markdown(lines_of(variants, rows), command=command))
    return path


def lines_of(variants: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The lines of the table, those of a mode together.

    Args:
      variants: as of `write_table`.
      rows: of `_rows`: a measurement each.
    """
    grouped: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = collections.defaultdict(dict)
    for row in rows:
        grouped[row["mode"], row["variant"], row["reading"]][row["seed"]] = row
    figures = {
        key: {seed: row["bits_per_byte"] for seed, row in by_seed.items()} for key, by_seed in grouped.items()
    }
    modes = list(dict.fromkeys(mode for mode, _, _ in grouped))
    order = sorted(grouped, key=lambda key: (modes.index(key[0]), variants.index(key[1])))
    return [
        Line(
            variant=variant,
            reading=reading,
            mode=mode,
            figures=figures[mode, variant, reading],
            own=figures.get((mode, variant, _AS_TRAINED), {}),
            base=figures.get((mode, variants[0], _AS_TRAINED), {}),
            by_position=_by_position(grouped[mode, variant, reading]),
            parameters=_each_once(grouped[mode, variant, reading], "parameters"),
            tokens=_each_once(grouped[mode, variant, reading], "trained_tokens"),
            minutes=statistics.fmean(row["minutes"] for row in grouped[mode, variant, reading].values()),
        )
        for mode, variant, reading in order
    ]


def markdown(lines: Sequence[Line], *, command: str) -> str:
    """Lines as tables of Markdown: bits per byte, then by position."""
    first = lines[0].variant
    parts = [f"    {command}\n"]
    for mode in dict.fromkeys(line.mode for line in lines):
        parts.append(f"Mode `{mode}`: bits per byte, mean over seeds ± standard deviation.\n")
        table = [
            "| variant | read | parameters | tokens | minutes | bits per byte | seeds "
            f"| less {first} | less as trained |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        own = [line for line in lines if line.mode == mode]
        for line in own:
            is_first = line.variant == first and line.reading == _AS_TRAINED
            cells = (
                line.variant,
                line.reading,
                _counts(line.parameters),
                _counts(line.tokens),
                f"{line.minutes:.1f}",
                _spread(list(line.figures.values())),
                " ".join(f"{line.figures[seed]:.4f}" for seed in sorted(line.figures)),
                "" if is_first else _spread(_paired(line.figures, line.base), sign="+"),
                "" if line.reading == _AS_TRAINED else _spread(_paired(line.figures, line.own), sign="+"),
            )
            table.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(table) + "\n")
        with_positions = [line for line in own if line.by_position]
        if with_positions:
            buckets = list(with_positions[0].by_position)
            heads = [f"{start:,} to {last:,}" for start, last in buckets]
            table = ["| variant | read | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
            for line in with_positions:
                cells = [_spread(list(line.by_position.get(bucket, {}).values())) for bucket in buckets]
                table.append(f"| {line.variant} | {line.reading} | " + " | ".join(cells) + " |")
            parts += ["By position in the window:\n", "\n".join(table) + "\n"]
    parts += [_unequal(lines)]
    return "\n".join(part for part in parts if part)


def _rows(trained: Sequence[Training], folder: Path) -> list[dict[str, Any]]:
    """Measurements with the variant, the seed and what the training cost."""
    by_run = {str(one.folder): one for one in trained}
    results = json.loads((folder / RESULTS).read_text())["results"]
    own = {(row["run"], row["mode"]): row for row in results if row["is_own"]}
    rows = []
    for row in results:
        if row["run"] not in by_run:
            continue
        one = by_run[row["run"]]
        told = json.loads((one.folder / RESULT_FILE).read_text())
        as_trained = own.get((row["run"], row["mode"]), row)
        turned = [
            f"{name.replace('_', ' ')} {row[name]}" for name in _TURNED if row[name] != as_trained[name]
        ]
        rows.append(
            {
                "variant": one.variant,
                "seed": one.seed,
                "reading": ", ".join(turned) or _AS_TRAINED,
                "parameters": told["parameters"],
                "trained_tokens": told["training"]["tokens"],
                "minutes": told["training"]["seconds"] / 60,
                **{name: value for name, value in row.items() if not isinstance(value, dict | list)},
                "by_position": row["by_position"],
            }
        )
    return rows


def _by_position(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[tuple[int, int], dict[int, float]]:
    found: dict[tuple[int, int], dict[int, float]] = collections.defaultdict(dict)
    for seed, row in by_seed.items():
        for bucket in row["by_position"] or ():
            if bucket["bits_per_byte"] is not None:  # as where no token of these places is scored
                found[bucket["from"], bucket["to"]][seed] = bucket["bits_per_byte"]
    return dict(sorted(found.items()))


def _each_once(by_seed: Mapping[int, Mapping[str, Any]], name: str) -> tuple[int, ...]:
    return tuple(sorted({row[name] for row in by_seed.values()}))


def _paired(figures: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    return [figures[seed] - others[seed] for seed in sorted(figures) if seed in others]


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _counts(values: Sequence[int]) -> str:
    return " and ".join(f"{value:,}" for value in values)


def _unequal(lines: Sequence[Line]) -> str:
    """A sentence where the comparison is none of like with like."""
    told = []
    for name in ("parameters", "tokens"):
        values = sorted({value for line in lines for value in getattr(line, name)})
        if len(values) > 1:
            told.append(f"{name} differ by {values[-1] / values[0] - 1:.1%}")
    if len({tuple(sorted(line.figures)) for line in lines if line.reading == _AS_TRAINED}) > 1:
        told.append("not every variant has every seed")
    return f"Not alike: {'; '.join(told)}.\n" if told else ""

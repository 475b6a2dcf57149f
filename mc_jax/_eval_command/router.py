"""What a run's router reads of a text of the user's."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mc_jax._arguments import UsageError
from mc_jax._eval_command.arguments import EvalArguments
from mc_jax._eval_command.opened import open_run, settings_of
from mc_jax._eval_command.shown import print_turned

if TYPE_CHECKING:
    from mc_jax.evaluation.inspected import InspectedText
    from mc_jax.evaluation.needle import NeedleReading


def tell_router(chosen: EvalArguments, source: str) -> None:
    """Print what each token of a text reads, and write it as JSON and a page where that is asked.

    Args:
      chosen: the options.
      source: a file, or "-".
    """
    if len(chosen.runs) > 1:
        raise UsageError("--inspect-router reads with one run; name one")
    (folder,) = chosen.runs
    settings_of(folder, chosen)
    text, name = _text(source), "standard input" if source == "-" else source
    files = {} if chosen.output is None else _files(chosen.output, folder)

    from mc_jax.data.files import json_text, write_json, write_text
    from mc_jax.evaluation.inspected import inspect_text
    from mc_jax.evaluation.router_page import router_page

    asked = 1 if chosen.asked_tokens is None else chosen.asked_tokens
    found = inspect_text(open_run(folder, chosen), text, name=name, needle=chosen.needle, asked_tokens=asked)
    if files:
        write_json(files["json"], found.to_json())
        write_text(files["html"], router_page(found))
    if chosen.json:
        print(json_text(found.to_json()))
        return
    _print(found)
    for file in files.values():
        print(f"written: {file}")


def _text(source: str) -> str:
    """The text of a file; an editor's newline at its end is no part of it."""
    if source == "-":
        data = sys.stdin.buffer.read()
    elif Path(source).is_file():
        data = Path(source).read_bytes()
    else:
        raise UsageError(
            f"there is no file {source}; --inspect-router takes the path of a text file, or - for a text on "
            "standard input"
        )
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is no text in UTF-8: {error.reason} at byte {error.start}") from None


def _files(folder: Path, run: str) -> dict[str, Path]:
    files = {kind: folder / f"{Path(run).name}.router.{kind}" for kind in ("html", "json")}
    for file in files.values():
        if file.exists():
            raise UsageError(f"{file} is there already; name another folder with --output, or delete it")
    return files


def _print(found: "InspectedText") -> None:
    from rich.console import Console
    from rich.table import Table

    inspection = found.inspection
    # Wide where nobody's terminal says how wide, so that no number is broken up.
    console = Console(width=None if sys.stdout.isatty() else 160)
    blocks = inspection.blocks()
    entropy, relative = (values.mean(axis=1) for values in inspection.entropy())
    columns = [_span(first + 1, stop) for first, stop in blocks.segments]
    for place, layer in enumerate(inspection.layers):
        title = f"layer {layer}: share of the reading, by segment"
        caption = f"entropy {entropy[place]:.2f} nats, {relative[place]:.0%} of that of equal shares"
        table = Table(
            "positions", *columns, inspection.rest, title=title, caption=caption, min_width=len(caption)
        )
        for (start, stop), shares in zip(blocks.positions, blocks.shares[place], strict=True):
            # Nobody reads a segment that has not ended.
            cached = (
                f"{share:.0%}" if (first + 1) * inspection.segment_length < stop else ""
                for (first, _), share in zip(blocks.segments, shares[:-1], strict=True)
            )
            table.add_row(_span(start, stop - 1), *cached, f"{shares[-1]:.0%}")
        console.print(table)
    if inspection.needle is not None:
        _print_needle(console, inspection.layers, inspection.needle)
    print(
        f"{found.name}: {len(inspection.tokens):,} tokens in segments of {inspection.segment_length:,}; "
        "shares are means over heads and positions"
    )
    print_turned(found.origin.run, found.origin.turned)


def _print_needle(console, layers: tuple[int, ...], needle: "NeedleReading") -> None:
    from rich.table import Table

    where = _span(needle.segments[0] + 1, needle.segments[-1] + 1)
    count = needle.asked[1] - needle.asked[0]
    asked = "the last token finds" if count == 1 else f"the last {count:,} tokens find"
    heads = range(1, needle.hit_rate.shape[1] + 1)
    title = f"how {asked} the needle in segment {where}"
    table = Table(
        "layer", "share", "hit rate", *(f"head {head}" for head in heads), title=title, min_width=64
    )
    for layer, shares, rates in zip(layers, needle.share, needle.hit_rate, strict=True):
        of_heads = (f"{rate:.0%}" for rate in rates)
        table.add_row(str(layer), f"{shares.mean():.0%}", f"{rates.mean():.0%}", *of_heads)
    console.print(table)
    print(
        f"a hit reads the needle's segment more than any other cached one: {needle.hit_rate.mean():.0%} of "
        f"layers and heads do, {needle.chance:.0%} would by chance; some layer and head for "
        f"{needle.any_hit_rate:.0%} of the asked tokens"
    )


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"

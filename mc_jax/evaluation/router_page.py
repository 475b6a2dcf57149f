"""The page of what a router reads of a text: heat maps, how a needle is found, the text itself."""

from collections.abc import Sequence
from pathlib import PurePath

from mc_jax.evaluation._page import escape, page, section
from mc_jax.evaluation._router_figure import router_figure
from mc_jax.evaluation.inspected import InspectedText
from mc_jax.evaluation.needle import NeedleReading
from mc_jax.evaluation.router import Inspection

_STYLE = """
mark { background: var(--tint); color: inherit; border-radius: 0.2rem; padding: 0.1rem 0; }
.wide + .note { margin-top: 0.6rem; }
mark.asked { background: none; text-decoration: underline; text-underline-offset: 0.2rem; }
"""


def router_page(found: InspectedText) -> str:
    """HTML that needs nothing else."""
    inspection, needle = found.inspection, found.inspection.needle
    sections = [section("What was read", _facts(found))]
    if needle is not None:
        sections.append(section("How the needle is found", _needle(inspection, needle)))
    sections.append(section("Where each token reads", _figure(inspection)))
    sections.append(section("The layers", _layers(inspection)))
    sections.append(section("The text", _text(found)))
    return page(PurePath(found.origin.run).name, "What its router reads", sections, _STYLE)


def _facts(found: InspectedText) -> str:
    inspection = found.inspection
    ended = (len(inspection.tokens) - 1) // inspection.segment_length
    changed = ", ".join(f"{name} {old} → {new}" for name, (old, new) in found.origin.turned.items())
    how = f"read otherwise than it was trained: {changed}" if changed else "read as it was trained"
    return (
        f"<p>{escape(found.origin.run)}, step {found.origin.step:,}, {escape(how)}.</p>"
        f"<p>{escape(found.name)}: {len(inspection.tokens):,} tokens in segments of "
        f"{inspection.segment_length:,}, {ended:,} of which its last token finds in the cache.</p>"
    )


def _needle(inspection: Inspection, needle: NeedleReading) -> str:
    heads = range(1, needle.hit_rate.shape[1] + 1)
    count = needle.asked[1] - needle.asked[0]
    asked = "the last token" if count == 1 else f"the last {count:,} tokens"
    where = " and ".join(str(number + 1) for number in needle.segments)
    tiles = "".join(
        f'<div class="figure"><dt>{label}<span>{note}</span></dt><dd>{value:.0%}</dd></div>'
        for value, label, note in (
            (needle.hit_rate.mean(), "of layers and heads hit", f"{needle.chance:.0%} by chance"),
            (needle.any_hit_rate, "of the asked tokens", "hit in some layer and head"),
            (needle.share.mean(), "of the reading", "is the needle's segment"),
        )
    )
    names = ("layer", "share", "hit rate", *(f"head {head}" for head in heads))
    rows = [
        (str(layer), *(f"{value:.0%}" for value in (shares.mean(), rates.mean(), *rates)))
        for layer, shares, rates in zip(inspection.layers, needle.share, needle.hit_rate, strict=True)
    ]
    return (
        f'<dl class="figures">{tiles}</dl>{_table(names, rows)}<p class="note">The needle is in segment '
        f"{where}; {asked} of the text should read it. A hit reads that segment more than any other cached "
        "one.</p>"
    )


def _figure(inspection: Inspection) -> str:
    from mc_jax.evaluation import _plots

    if len(inspection.tokens) <= inspection.segment_length:
        return "<p>The text fits in one segment: there was no cached memory to read.</p>"
    gates = inspection.gates.mean(axis=2)
    return router_figure(
        _plots,
        gates,
        inspection.layers,
        inspection.segment_length,
        inspection.needle,
        rest=inspection.rest,
    )


def _layers(inspection: Inspection) -> str:
    seen = slice(inspection.segment_length, None)
    cached = inspection.gates[:, seen, :, :-1].sum(axis=-1)
    entropy, relative = inspection.entropy()
    rows = [
        (
            str(layer),
            f"{cached[place].mean():.1%}" if cached.size else "-",
            f"{entropy[place].mean():.2f}",
            f"{relative[place].mean():.0%}",
        )
        for place, layer in enumerate(inspection.layers)
    ]
    note = "Means over heads and over the tokens that see at least one cached memory."
    return (
        f'{_table(("layer", "cached memories", "entropy, nats", "of equal"), rows)}<p class="note">{note}</p>'
    )


def _text(found: InspectedText) -> str:
    text, needle, reading = found.text, found.needle, found.inspection.needle
    if needle is None or reading is None:
        return f"<pre>{escape(text)}</pre>"
    # A token may be a part of a character, so the asked ones are counted from the text's end.
    asked = "".join(found.inspection.tokens[reading.asked[0] :])
    asked = asked if text.endswith(asked) and needle.stop <= len(text) - len(asked) else ""
    end = len(text) - len(asked)
    return (
        f"<pre>{escape(text[: needle.start])}<mark>{escape(text[needle.start : needle.stop])}</mark>"
        f'{escape(text[needle.stop : end])}<mark class="asked">{escape(asked)}</mark></pre>'
        '<p class="note">The needle is shaded, what asks for it underlined.</p>'
    )


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )

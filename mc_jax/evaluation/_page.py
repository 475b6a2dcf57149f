"""The look that the pages share: one HTML file each, which needs nothing else, to read, keep and send."""

import base64
import html
from collections.abc import Callable
from typing import Any


def page(title: str, kind: str, sections: list[str], style: str = "") -> str:
    """A whole page.

    Args:
      title: its heading.
      kind: a few words above it.
      sections: HTML of each, as `section` makes it.
      style: rules of this page alone.
    """
    return _PAGE.format(
        title=escape(title), kind=escape(kind), style=_STYLE + style, body="\n".join(sections)
    )


def responsive_picture(draw: Callable[[Any, bool], str], plots: Any, alternative: str, caption: str) -> str:
    """A figure of four SVG pictures, of which a page, light or dark, wide or narrow, shows one.

    Args:
      draw: from a theme, and whether the page is narrow, to SVG text.
      plots: the module `_plots`, which takes seconds to import.
      alternative: what the picture shows, for who does not see it.
      caption: under it.
    """
    sources = [
        (f"{_NARROW} and {_DARK}", _as_data(draw(plots.DARK, True))),
        (_NARROW, _as_data(draw(plots.LIGHT, True))),
        (_DARK, _as_data(draw(plots.DARK, False))),
    ]
    others = "".join(f'<source media="{when}" srcset="{source}">' for when, source in sources)
    return (
        f'<figure><picture>{others}<img src="{_as_data(draw(plots.LIGHT, False))}" '
        f'alt="{escape(alternative)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


_DARK, _NARROW = "(prefers-color-scheme: dark)", "(max-width: 40rem)"


def _as_data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def section(heading: str, content: str) -> str:
    """A part of a page, with a heading in plain text over HTML."""
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def escape(text: str) -> str:
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
<header><p>{kind}</p><h1>{title}</h1></header>
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
img { display: block; width: 100%; height: auto; }
.next { margin-top: 1.75rem; }
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
.made th { color: var(--muted); white-space: nowrap; }
.made td { overflow-wrap: anywhere; }
pre, code { font: 0.875rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0.35rem 0 1rem; padding: 0.8rem 1rem; background: var(--panel); border-radius: 0.5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample { font-family: Georgia, "Times New Roman", serif; font-size: 1rem; line-height: 1.65; }
.prompt { background: var(--tint); border-radius: 0.2rem; padding: 0.1rem 0; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.875rem; }
details pre { max-height: 24rem; overflow-y: auto; }
"""

"""Pages that are written for people, taken apart: their tags, words and pictures."""

import base64
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest


class HtmlPage(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def named(self, tag: str) -> list[dict]:
        """The attributes of each tag of a name."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.words)

    def pictures(self) -> list[str]:
        """SVG text: what each <img> shows by itself, then each <source>."""
        data = [image["src"] for image in self.named("img")]
        data += [source["srcset"] for source in self.named("source")]
        return [base64.b64decode(one.removeprefix("data:image/svg+xml;base64,")).decode() for one in data]


def must_load_nothing(text: str, *, runs: bool = False) -> None:
    """See that a page needs no other file, and runs nothing unless it is one that `runs`."""
    refused = {"link", "iframe"} if runs else {"link", "iframe", "script"}
    for tag, attributes in HtmlPage(text).tags:
        assert tag not in refused, f"<{tag}> loads or runs something"
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:"), f"{name} of <{tag}> leaves the file"
    loads = re.search(r"url\(|@import" + (r"|fetch\(|import\(" if runs else ""), _code(text))
    assert loads is None, f"{loads} loads something"


def _code(text: str) -> str:
    """Styles and scripts of a page."""
    return "".join(code for _, code in re.findall(r"<(style|script)[^>]*>(.*?)</\1>", text, re.DOTALL))


# What is to be seen of any page; in a frame, for a window is never narrower than 500.
_LOOK = """
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const found = {widths: [root.clientWidth, root.scrollWidth]};
  found.pictures = [...page.images].map(image => image.complete && image.naturalWidth > 0);
  MORE
  document.body.textContent = JSON.stringify(found);
}
"""


def must_fit_in_a_browser(text: str, width: int, folder: pathlib.Path, more: str = "") -> dict[str, Any]:
    """See that a page has no errors, broken pictures or parts that stand out; skipped without a browser.

    Args:
      text: the page.
      width: pixels.
      folder: for files of the browser.
      more: JavaScript that does something in `page`, and puts what is then seen into `found`.

    Returns:
      What was found.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at the page with: apt-get install chromium")
    frame = f'<iframe style="border: 0; width: {width}px" srcdoc="{html.escape(text)}"></iframe>'
    look = _LOOK.replace("MORE", more)
    (folder / "frame.html").write_text(f"<body>{frame}<script>{look}</script></body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    places = [f"--user-data-dir={folder}", f"file://{folder}/frame.html"]
    done = subprocess.run(
        [browser, *options, "--enable-logging=stderr", *places],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = re.search(r"<body>(\{.*\})</body>", done.stdout)
    assert told is not None, done.stdout[-2000:] + done.stderr
    found = json.loads(html.unescape(told[1]))
    assert found["widths"] == [width, width], "something wide does not scroll within its own box"
    assert all(found["pictures"]), "a picture is broken"
    return found

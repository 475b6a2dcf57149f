"""Pages that are written for people, taken apart: their tags, words and pictures."""

import base64
import html.parser
import re


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

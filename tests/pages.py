"""The commands on a page of Markdown: the lines of its blocks ```sh. No package is needed for this."""

import pathlib
import re
import shlex
import string
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))


class Command(NamedTuple):
    """A command line, as a shell would take it apart."""

    words: list[str]
    """Without variables before it; what the page exported is filled in."""
    where: str
    """Page and line."""


def commands(page: pathlib.Path) -> Iterator[Command]:
    """The commands of a page, in order."""
    variables: dict[str, str] = {}
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        first_line = text.count("\n", 0, block.start(1)) + 1
        started = ""
        for offset, line in enumerate(block[1].splitlines()):
            if line.endswith("\\"):
                started += line[:-1]
                continue
            filled, started = string.Template(started + line).substitute(variables), ""
            words = shlex.split(filled, comments=True)
            if words[:1] == ["export"]:
                variables |= {name: value for name, _, value in (word.partition("=") for word in words[1:])}
                continue
            if words:
                yield Command(words, f"{page.relative_to(ROOT)}:{first_line + offset}")


def all_commands() -> list[Command]:
    """The commands of README.md and of all pages in docs/."""
    return [command for page in PAGES for command in commands(page)]

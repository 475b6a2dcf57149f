"""JSON values from a stream of text: the elements of an array, or values one after the other."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_BETWEEN = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_MORE_CHARACTERS = 1 << 16


def json_values(chunks: Iterable[str], longest: int) -> Iterator[tuple[int, Any]]:
    """The elements of an array, or values that follow each other, as .json files of many lines have them.

    A value is in memory at a time. One that the text at hand does not end is tried again when there is twice
    as much of it.

    Args:
      chunks: the text.
      longest: characters that a value may have.

    Yields:
      The line on which a value begins, from 1, and the value.

    Raises:
      ValueError: "LINE what is wrong there".
    """
    stream = _Text(iter(chunks))
    stream.skip(_SPACE)
    is_array = stream.next_is("[")
    decoder = json.JSONDecoder()
    while True:
        stream.skip(_BETWEEN)
        if is_array and stream.next_is("]"):
            stream.skip(_SPACE)
            if stream.left():
                raise ValueError(f"{stream.line} has something after the end of its array")
            return
        if not stream.left():
            if is_array:
                raise ValueError(f"{stream.line} ends within an array: it is not whole")
            return
        line = stream.line
        while True:
            try:
                value, end = decoder.raw_decode(stream.text, stream.at)
            except RecursionError:
                raise ValueError(f"{line} is nested too deeply to be read") from None
            except json.JSONDecodeError as error:
                if stream.left() < longest and stream.grow(stream.left() + _MORE_CHARACTERS):
                    continue
                line += stream.text.count("\n", stream.at, error.pos)
                long = "" if stream.left() < longest else f", or longer than {longest >> 20} MiB"
                raise ValueError(f"{line} is not JSON ({error.msg}){long}") from None
            # A number may go on behind the text at hand; what has an end of its own does not.
            if end < len(stream.text) or stream.text[end - 1] in '"]}' or not stream.grow(_MORE_CHARACTERS):
                break
        stream.move(end)
        yield line, value


class _Text:
    """The text at hand, and the place in it up to which it is read."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self.text, self.at, self.line = "", 0, 1

    def left(self) -> int:
        """Characters at hand; 0 at the end of the stream alone, after `skip`."""
        return len(self.text) - self.at

    def grow(self, characters: int) -> bool:
        """Have this many characters more; False: there are none."""
        parts, size = [self.text[self.at :]], 0
        while size < characters and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            size += len(chunk)
        if size:
            self.text, self.at = "".join(parts), 0
        return size > 0

    def move(self, end: int) -> None:
        """Go on to a place."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Go behind what lies between values; some text is at hand after, or the stream is at its end."""
        while True:
            found = pattern.match(self.text, self.at)
            assert found is not None
            self.move(found.end())
            if self.left() or not self.grow(_MORE_CHARACTERS):
                return
            pattern = pattern if found.group().count(",") == 0 else _SPACE

    def next_is(self, character: str) -> bool:
        """Whether this comes next, and go behind it then."""
        is_next = self.text.startswith(character, self.at)
        self.at += is_next
        return is_next

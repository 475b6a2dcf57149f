"""How a compiled program sends while it computes.

There are four ways. A pair of "-start" and "-done" of the collective's name. Three calls on another core of
the chip (SparseCore), of which "call-update" is what hands the operands over. On a v5e, a gather in pieces
between the steps of other fusions: it stands in the text of those, too. And, between slices, a "send" to the
host, whose runtime (Megascale) passes it on, and the "recv" of what comes of it, which may stand before it.
"""

import re
from collections.abc import Callable

_COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\(")
_RUNS = re.compile(r" (?:calls|to_apply)=%?([\w.\-<>]+)")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BETWEEN_SLICES = re.compile(r" send\(.*_xla_megascale_transfer_type=")
_MEETING = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_IN_PIECES = '"async_collective_fusion_config"'


def sends(line: str) -> bool:
    """Whether an operation's line is that of a collective."""
    return _COLLECTIVE.search(line) is not None or _BETWEEN_SLICES.search(line) is not None


def runs_of(line: str) -> str | None:
    """Return the computation that an operation is made of, or calls."""
    found = _RUNS.search(line)
    return found and found[1]


class Sendings:
    """The start op of every asynchronous transfer of a computation, and the op that waits for it."""

    def __init__(self, inside: Callable[[str], str | None], is_target: Callable[[str, str], bool]):
        """Take what tells a computation's line that sends, by its name, and whether it calls a function."""
        self._inside, self._is_target = inside, is_target
        self._called: dict[str, str] = {}
        """Calls without operands so far, and what they will send."""
        self._begun: dict[str, str] = {}
        """Op name, channel id or rendezvous key -> the op that started the transfer."""
        self._received: dict[str, str] = {}
        """recv op -> rendezvous key of the matching cross-slice send."""

    def read(self, name: str, kind: str, line: str) -> tuple[str | None, bool, str | None]:
        """Return what an operation sends, whether others go on meanwhile, and which of them it waits for."""
        step = kind.rpartition("-")[2]
        if kind in ("send", "recv") and (meeting := _MEETING.search(line)):
            if kind == "recv":
                self._received[name] = meeting[1]
                return None, False, None
            self._begun[meeting[1]] = name
            return line, True, None
        if step in ("update", "done"):
            given = _OPERANDS.findall(line.partition(f" {kind}(")[2].partition(")")[0])
            if called := next((self._called[one] for one in given if one in self._called), None):
                self._begun[name] = name
                return called, True, None
            given = [self._received.get(one, one) for one in given]
            begun = next((self._begun[one] for one in given if one in self._begun), None)
            if begun and step == "update":
                self._begun[name] = begun
            return None, False, begun if step == "done" else None
        runs = runs_of(line)
        found = line if sends(line) else self._inside(runs) if runs else None
        if found is None:
            return None, False, None
        if f" {kind}()" in line:
            self._called[name] = found
            return None, False, None
        if runs and _IN_PIECES in found:
            return self._in_pieces(name, runs, found)
        if step == "start":
            self._begun[name] = name
        return found, step == "start", None

    def _in_pieces(self, name: str, runs: str, found: str) -> tuple[str | None, bool, str | None]:
        channel = _CHANNEL.search(found)
        assert channel is not None, found
        if self._is_target(runs, "AsyncCollectiveStart"):
            self._begun[channel[0]] = name
            return found, True, None
        if self._is_target(runs, "AsyncCollectiveDone"):
            return None, False, self._begun[channel[0]]
        return (None, False, None) if channel[0] in self._begun else (found, False, None)

"""The schedule of a Pallas kernel, as the TPU's compiler writes it down.

A line is a bundle: what a core issues in one cycle. Angle brackets before it tell how many loops it is in;
"LB" marks the first bundle of a loop's body. A loop whose number of turns the compiler knows ends in a
comparison with that number.
"""

import dataclasses
import re
from collections.abc import Iterator

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<mark>[A-Z]{2})?\s*:(?P<nesting>[ >]*)\{(?P<body>.*)$")
_TURNS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_COPY = re.compile(r"dma\.(?:hbm_to_vmem|vmem_to_hbm) .*?/\*size_in_granules=\*/(\d+)")
_GRANULE = 32


@dataclasses.dataclass
class Loop:
    """A loop of a kernel, or the kernel itself; what is in a branch counts as if it always ran."""

    bundles: int = 0
    """Of a turn, without the loops in it."""
    copied: int = 0
    """Bytes that a turn moves between HBM and VMEM, without the loops in it."""
    turns: int | None = None
    """None: decided while it runs."""
    loops: list["Loop"] = dataclasses.field(default_factory=list)
    """What is in it."""

    def cycles(self, turns: Iterator[float]) -> float:
        """Bundles in all; `turns` gives means for the loops whose turns are not known, in order."""
        count = self._turns(turns)
        return count * (self.bundles + sum(loop.cycles(turns) for loop in self.loops))

    def bytes(self, turns: Iterator[float]) -> float:
        """Bytes moved in all; see `cycles`."""
        count = self._turns(turns)
        return count * (self.copied + sum(loop.bytes(turns) for loop in self.loops))

    def _turns(self, turns: Iterator[float]) -> float:
        if self.turns is not None:
            return self.turns
        count = next(turns, None)
        if count is None:
            raise ValueError("a loop's turns are decided while it runs; give the mean of how many it makes")
        return count


def read_schedule(text: str) -> Loop:
    """Return the kernel of a file `*final_bundles.txt`, which libtpu writes with --xla_jf_dump_llo_text."""
    kernel = Loop(turns=1)
    nest = [kernel]
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle is None:
            continue
        depth = bundle["nesting"].count(">")
        body = bundle["body"]
        if body.startswith("}") and depth == 0:
            depth = len(nest) - 1  # a bundle that only waits carries no brackets
        if bundle["mark"] == "LB":
            del nest[depth:]
            nest[-1].loops.append(Loop())
            nest.append(nest[-1].loops[-1])
        del nest[depth + 1 :]
        here = nest[-1]
        here.bundles += 1
        here.copied += sum(_GRANULE * int(granules) for granules in _COPY.findall(body))
        if turns := _TURNS.search(body):
            here.turns = int(turns[1])
    return kernel

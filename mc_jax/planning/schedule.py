"""The schedule of a Pallas kernel, as the TPU's compiler writes it down.

A line is a bundle: what a core issues in one cycle. Angle brackets before it tell how many loops it is in;
"LB" marks the first bundle of a loop's body. A loop whose number of turns the compiler knows ends in a
comparison with that number. A branch jumps to a region further down; the regions' starts stand in comments.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<mark>[A-Z]{2})?\s*:(?P<nesting>[ >]*)\{(?P<body>.*)$")
_TURNS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_COPY = re.compile(r"dma\.(?:hbm_to_vmem|vmem_to_hbm) .*?/\*size_in_granules=\*/(\d+)")
_GRANULE = 32
_JUMP = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)\b")
_PRODUCT = re.compile(r"\bvmat(?!pop)\w+")
# Bundles after a jump that are run either way.
_DELAY = 4


@dataclasses.dataclass
class Branch:
    """A conditional region with matmuls and no DMA; nested loops are counted apart."""

    number: int
    """Counted through the kernel."""
    bundles: int = 0
    """Bundles of it when it runs."""


@dataclasses.dataclass
class Loop:
    """A loop of a kernel, or the kernel; branches without matrix products count as if they always ran."""

    bundles: int = 0
    """Bundles of one iteration, nested loops left out."""
    copied: int = 0
    """Bytes that one iteration moves between HBM and VMEM, nested loops left out."""
    turns: int | None = None
    """Trip count; None: it depends on data."""
    loops: list["Loop"] = dataclasses.field(default_factory=list)
    """Loops directly in this one."""
    branches: list[Branch] = dataclasses.field(default_factory=list)
    """Branches directly in this loop, whose `bundles` leave theirs out."""

    def cycles(self, turns: Iterator[float], shares: Sequence[float] = ()) -> float:
        """Bundles in all.

        Args:
          turns: means for the loops whose turns are not known, in order.
          shares: of each branch, in order, the share of its loop's turns that run it. If they are not as many
            as there are branches, each counts as if it always ran.
        """
        if len(shares) != self.count_branches():
            shares = [1.0] * self.count_branches()
        return self._cycles(turns, shares)

    def bytes(self, turns: Iterator[float]) -> float:
        """Bytes moved in all; see `cycles`."""
        count = self._turns(turns)
        return count * (self.copied + sum(loop.bytes(turns) for loop in self.loops))

    def count_branches(self) -> int:
        """Return how many there are in it, and in the loops in it."""
        return len(self.branches) + sum(loop.count_branches() for loop in self.loops)

    def _cycles(self, turns: Iterator[float], shares: Sequence[float]) -> float:
        count = self._turns(turns)
        branches = sum(shares[branch.number] * branch.bundles for branch in self.branches)
        return count * (self.bundles + branches + sum(loop._cycles(turns, shares) for loop in self.loops))

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
    bundles = [bundle for line in text.splitlines() if (bundle := _BUNDLE.match(line))]
    loops: list[Loop] = []
    for bundle, depth in zip(bundles, _depths(bundles), strict=True):
        body = bundle["body"]
        if bundle["mark"] == "LB":
            del nest[depth:]
            nest[-1].loops.append(Loop())
            nest.append(nest[-1].loops[-1])
        del nest[depth + 1 :]
        loops.append(nest[-1])
        if turns := _TURNS.search(body):
            nest[-1].turns = int(turns[1])
    bodies = [bundle["body"] for bundle in bundles]
    branches = _branches(bodies, loops)
    for body, loop, branch in zip(bodies, loops, branches, strict=True):
        (branch or loop).bundles += 1
        loop.copied += sum(_GRANULE * int(granules) for granules in _COPY.findall(body))
    return kernel


def _depths(bundles: Sequence[re.Match]) -> list[int]:
    """Return in how many loops each bundle is.

    Brackets tell less of those that only wait, and of those in a loop that only do what is for after it: what
    comes before a bundle of a loop and after the loop's first one is in it.
    """
    depths = []
    for bundle in bundles:
        waits = bundle["body"].startswith("}") and depths
        depths.append(depths[-1] if waits else bundle["nesting"].count(">"))
    least = 0
    for at in reversed(range(len(bundles))):
        depths[at] = max(depths[at], least)
        least = depths[at] - (bundles[at]["mark"] == "LB")
    return depths


def _branches(bodies: list[str], loops: list[Loop]) -> list[Branch | None]:
    """Return the inmost branch with matrix products that each bundle is in, and put each into its loop."""
    starts: dict[int, int] = {}
    for at, body in enumerate(bodies):
        for region in _START.findall(body):
            starts.setdefault(int(region), at)
    inmost = [-1] * len(bodies)
    jumps = []
    for at, body in enumerate(bodies):
        if jump := _JUMP.search(body):
            end = starts.get(int(jump[1]), -1)  # the exits of loops jump backwards
            inside = [n for n in range(at + 1 + _DELAY, end) if loops[n] is loops[at]]
            for n in inside:
                inmost[n] = len(jumps)
            jumps.append(loops[at])
    multiplies = {inmost[at] for at, body in enumerate(bodies) if _PRODUCT.search(body)} - {-1}
    # What a grid's pipeline jumps over has copies in it.
    multiplies -= {inmost[at] for at, body in enumerate(bodies) if _COPY.search(body)}
    found: dict[int, Branch] = {}
    for number, jump in enumerate(sorted(multiplies)):
        found[jump] = Branch(number)
        jumps[jump].branches.append(found[jump])
    return [found.get(jump) for jump in inmost]

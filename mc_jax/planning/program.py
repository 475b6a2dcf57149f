"""The operations of a compiled program: how often each runs, and the compiler's estimate of its time."""

import dataclasses
import functools
import re
from collections.abc import Iterator

from mc_jax.planning._products import products_of
from mc_jax.planning._sendings import Sendings, runs_of, sends
from pallas_kernels._expected import SELDOM

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-<>]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<kind>[a-z][a-z0-9\-]*)\(")
_WHILE = re.compile(r"condition=%?([\w.\-<>]+), body=%?([\w.\-<>]+)")
_CALLED = re.compile(r"(?:to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)")
_FUSED = re.compile(r" calls=%?([\w.\-<>]+)")
_CONSTANT = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r" [su]32\[\]\S* get-tuple-element\(.*\), index=(\d+)")
_OPERANDS = re.compile(r" [a-z\-]+\(([^)]*)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_ROW = re.compile(r'^(\d+) (?:"(?P<text>[^"]*)"|\{(?P<fields>[^}]*)\})')
_OVERFLOW = 2**62  # an estimate that overflowed is printed as some 2^63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """A line of the Python program that an operation was traced at."""

    file: str
    """Its path."""
    function: str
    """Its qualified name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of a program, with the loops around it."""

    name: str
    """Its name in the program."""
    kind: str
    """Such as "fusion", "all-gather-start", "custom-call"."""
    shape: str
    """Shape of its result, with layouts."""
    source: str
    """What it was made from, as JAX names it."""
    times: int
    """How often it runs."""
    cycles: int
    """Cycles of one run by the compiler's estimate; 0 where it gives none, as for kernels."""
    is_kernel: bool
    """A Pallas kernel."""
    frames: tuple[Frame, ...] = ()
    """The stack it was traced in, innermost first, as far as JAX keeps it."""
    products: float = 0.0
    """FLOPs of the matrix products in it, of one run."""
    collective: str | None = None
    """The text of the operation in it that sends to other devices, if there is one."""
    overlaps: bool = False
    """Whether what it sends may be under way until some later operation waits for it."""
    waits_for: str | None = None
    """The name of the operation before it whose sending must have come to an end."""

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to a gradient."""
        return "transpose(" in self.source


def operations(text: str) -> Iterator[Operation]:
    """Yield the operations of an optimized program's text, `compiled.as_text()`, that run on their own.

    Of a conditional all branches count but those said to run seldom (`pallas_kernels._expected`). A
    `jax.lax.scan` is a loop whose counter is compared with a constant; it begins at 0, or later if the
    compiler has put the first turns before the loop.
    """
    program = _Program(text)
    yield from program.operations(program.entry, 1)


class _Program:
    def __init__(self, text: str):
        self.computations, self.entry = _computations(text)
        self._frames = _Frames(text)

    def operations(self, name: str, times: int) -> Iterator[Operation]:
        sendings = Sendings(self._collective, self._is_target)
        for line in self.computations.get(name, ()):
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            kind = operation["kind"]
            if kind == "while":
                found = _WHILE.search(line)
                assert found is not None
                yield from self.operations(found[2], times * self._turns(name, line, found[1]))
            elif kind in ("call", "conditional"):
                for called in re.findall(r"[\w.\-<>]+", " ".join(_CALLED.findall(line))):
                    yield from self.operations(called, times)
            else:
                cycles, source = _CYCLES.search(line), _SOURCE.search(line)
                if source and SELDOM in source[1].split("/"):
                    continue
                estimate = int(cycles[1]) if cycles else 0
                frame = _FRAME.search(line)
                fused = _FUSED.search(line)
                collective, overlaps, waits_for = sendings.read(operation["name"], kind, line)
                yield Operation(
                    name=operation["name"],
                    kind=kind,
                    shape=operation["shape"],
                    source=source[1] if source else "",
                    times=times,
                    cycles=estimate if estimate < _OVERFLOW else 0,
                    is_kernel='custom_call_target="tpu_custom_call"' in line,
                    frames=self._frames.of(int(frame[1])) if frame else (),
                    products=self._products(fused[1]) if fused else products_of(line, self._shapes(name)),
                    collective=collective,
                    overlaps=overlaps,
                    waits_for=waits_for,
                )

    def _turns(self, name: str, line: str, condition: str) -> int:
        """How often the loop at a line of a computation turns."""
        compared = "\n".join(self.computations[condition])
        limits = [int(limit) for limit in _CONSTANT.findall(compared)]
        counter = _COUNTER.search(compared)
        if counter is None:
            return max(limits, default=1)
        state = self._lines(name).get(_operands(line)[0], "")
        start = _operands(state)[int(counter[1])] if " tuple(" in state else ""
        while " copy(" in self._lines(name).get(start, ""):
            (start,) = _operands(self._lines(name)[start])
        first = _CONSTANT.search(self._lines(name).get(start, ""))
        return max(limits, default=1) - (int(first[1]) if first else 0)

    @functools.cache  # noqa: B019 - a program lives as long as what is read off it
    def _lines(self, name: str) -> dict[str, str]:
        """The lines of a computation by the names of their results."""
        found = ((_OPERATION.match(line), line) for line in self.computations[name])
        return {operation["name"]: line for operation, line in found if operation}

    @functools.cache  # noqa: B019
    def _products(self, name: str) -> float:
        """FLOPs of the matrix products of a fused computation."""
        total = 0.0
        for line in self.computations.get(name, ()):
            fused = _FUSED.search(line)
            total += self._products(fused[1]) if fused else products_of(line, self._shapes(name))
        return total

    @functools.cache  # noqa: B019
    def _collective(self, name: str) -> str | None:
        """The line of a computation that sends."""
        for line in self.computations.get(name, ()):
            runs = runs_of(line)
            found = line if sends(line) else self._collective(runs) if runs else None
            if found:
                # A sum that is divided at once is a reduce-scatter, which this compiler writes as a fusion.
                is_divided = "scatter" in name and " all-reduce(" in found
                return found.replace(" all-reduce(", " reduce-scatter-of(") if is_divided else found
        return None

    @functools.cache  # noqa: B019
    def _is_target(self, name: str, target: str) -> bool:
        """Whether a computation calls this of the compiler's own functions."""
        return any(f'custom_call_target="{target}"' in line for line in self.computations.get(name, ()))

    @functools.cache  # noqa: B019
    def _shapes(self, name: str) -> dict[str, str]:
        found = (_OPERATION.match(line) for line in self.computations.get(name, ()))
        return {operation["name"]: operation["shape"] for operation in found if operation}


def _operands(line: str) -> list[str]:
    """Names of what an operation is given."""
    found = _OPERANDS.search(re.sub(r"/\*.*?\*/", "", line))
    return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry = here = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = head["name"]
            found[here] = []
            entry = here if head["entry"] else entry
        elif line == "}":  # those of a constant's rows are not alone
            here = ""
        elif here:
            found[here].append(line)
    return found, entry


class _Frames:
    """The tables at the head of a program that tell where its operations were traced."""

    def __init__(self, text: str):
        self._tables: dict[str, dict[int, str]] = {}
        table: dict[int, str] = {}
        for line in text.splitlines():
            if _HEAD.match(line):
                break
            if line.strip() in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line.strip(), {})
            elif row := _ROW.match(line):
                table[int(row[1])] = row["text"] if row["fields"] is None else row["fields"]

    def of(self, frame: int) -> tuple[Frame, ...]:
        found = []
        while row := self._tables.get("StackFrames", {}).get(frame):
            fields = _numbers(row)
            location = _numbers(self._tables["FileLocations"][fields["file_location_id"]])
            found.append(
                Frame(
                    file=self._tables["FileNames"][location["file_name_id"]],
                    function=self._tables["FunctionNames"][location["function_name_id"]],
                )
            )
            # Counted from 1, where rows of the table are counted from 0: 1 is none.
            frame = fields.get("parent_frame_id", 1) - 1
        return tuple(found)


def _numbers(fields: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", fields)}

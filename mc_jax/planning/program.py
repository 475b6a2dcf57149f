"""The operations of a compiled program: how often each runs, and the compiler's estimate of its time."""

import dataclasses
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-<>]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<kind>[a-z][a-z0-9\-]*)\(")
_WHILE = re.compile(r"condition=%?([\w.\-<>]+), body=%?([\w.\-<>]+)")
_CALLED = re.compile(r"(?:to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|\S+)")
_LIMIT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_OVERFLOW = 2**62  # an estimate that overflowed is printed as some 2^63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of a program, with the loops around it."""

    name: str
    """In the program."""
    kind: str
    """Such as "fusion", "all-gather-start", "custom-call"."""
    shape: str
    """Of its result, with layouts."""
    source: str
    """What it was made from, as JAX names it."""
    times: int
    """How often it runs."""
    cycles: int
    """Of one run, by the compiler's estimate; 0 where it gives none, as of kernels."""
    is_kernel: bool
    """A Pallas kernel."""


def operations(text: str) -> Iterator[Operation]:
    """Yield the operations of an optimized program's text, `compiled.as_text()`, that run on their own.

    Of a conditional all branches count. A `jax.lax.scan` is a loop whose counter is compared with a constant.
    """
    computations, entry = _computations(text)
    yield from _operations(computations, entry, 1)


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


def _operations(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Operation]:
    for line in computations.get(name, ()):
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        kind = operation["kind"]
        if kind == "while":
            found = _WHILE.search(line)
            assert found is not None
            condition, body = found.groups()
            limits = [int(limit) for limit in _LIMIT.findall("\n".join(computations[condition]))]
            yield from _operations(computations, body, times * max(limits, default=1))
        elif kind in ("call", "conditional"):
            for called in re.findall(r"[\w.\-<>]+", " ".join(_CALLED.findall(line))):
                yield from _operations(computations, called, times)
        else:
            cycles, source = _CYCLES.search(line), _SOURCE.search(line)
            estimate = int(cycles[1]) if cycles else 0
            yield Operation(
                name=operation["name"],
                kind=kind,
                shape=operation["shape"],
                source=source[1] if source else "",
                times=times,
                cycles=estimate if estimate < _OVERFLOW else 0,
                is_kernel='custom_call_target="tpu_custom_call"' in line,
            )

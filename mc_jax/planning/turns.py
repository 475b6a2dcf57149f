"""Trip counts of a Pallas kernel's data-dependent loops, and the FLOPs of its matmuls.

A kernel is traced once for all steps of its grid. Bounds of its loops are sums of the step's place in the
grid and of constants: so they are computed here for all places at once, and averaged. So are the conditions
of its branches, and which blocks of its arguments and results a step finds where the step before left them.

Shapes: P places of the grid.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pallas_kernels._expected import SELDOM, TURNS

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: np.trunc(a / b).astype(np.int64),
    "rem": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": np.logical_not,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "select_n": lambda which, *cases: np.choose(which.astype(np.int64), cases),
    "convert_element_type": lambda x: x.astype(np.int64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelWork:
    """What a kernel does in all steps of its grid."""

    name: str
    """The name given to `pallas_call`."""
    turns: tuple[float, ...]
    """Trip count of each data-dependent loop, in order: its mean over the grid."""
    shares: tuple[float, ...]
    """For each branch with matmuls, in order: the share of its loop's iterations that run it."""
    products: float
    """FLOPs of its matrix products, in all places."""
    places: int
    """Number of grid points."""
    blocks: float
    """Bytes of the blocks that pass between HBM and VMEM, if all did at each place."""
    moved: float
    """The same without those that stay from one place to the next."""
    seldom: float
    """Bytes of copies that the kernel says to be seldom (`pallas_kernels._expected`), if all were made."""
    times: int
    """How often the program runs it, on a device."""


def kernel_works(program: Any, times: int = 1) -> Iterator[KernelWork]:
    """Yield the kernels of a program's jaxpr, one for each place that calls one."""
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            yield _work(equation, times)
            continue
        again = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in _inner(equation):
            yield from kernel_works(inner, again)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a kernel's schedule does not tell: means over the calls of kernels of one name."""

    turns: tuple[float, ...] = ()
    """See `KernelWork`; 1 for loops after the last."""
    shares: tuple[float, ...] = ()
    """See `KernelWork`."""
    places: float = 0
    """See `KernelWork`."""
    blocks: float = 0
    """See `KernelWork`."""
    moved: float = 0
    """See `KernelWork`."""
    seldom: float = 0
    """See `KernelWork`."""

    def each_turns(self) -> Iterator[float]:
        """Yield the turns of each loop without an end."""
        return itertools.chain(self.turns, itertools.repeat(1.0))


def counts_of(works: Iterable[KernelWork]) -> Callable[[str], Counts]:
    """Return what is counted of kernels by their name, as `kernels_of` asks for it."""
    calls: dict[str, list[KernelWork]] = {}
    for work in works:
        calls.setdefault(work.name, []).append(work)

    def counts(name: str) -> Counts:
        found = calls.get(name, [])
        if not found:
            return Counts()
        weights = [work.times for work in found]

        def mean(numbers: Iterable[float]) -> float:
            return float(np.average(list(numbers), weights=weights))

        return Counts(
            turns=tuple(map(mean, zip(*[work.turns for work in found], strict=False))),
            shares=tuple(map(mean, zip(*[work.shares for work in found], strict=False))),
            places=mean(work.places for work in found),
            blocks=mean(work.blocks for work in found),
            moved=mean(work.moved for work in found),
            seldom=mean(work.seldom for work in found),
        )

    return counts


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _work(equation: Any, times: int) -> KernelWork:
    mapping = equation.params["grid_mapping"]
    # A size that is decided while the program runs counts as one.
    grid = [size if isinstance(size, int) else 1 for size in mapping.grid]
    reader = _Reader(grid)
    program = equation.params["jaxpr"]
    program = getattr(program, "jaxpr", program)
    reader.run(program, [None] * len(program.invars), np.ones(math.prod(grid)))
    sizes = [(_block_bytes(block), _moves(block, grid)) for block in mapping.block_mappings]
    return KernelWork(
        name=equation.params["name"],
        turns=tuple(reader.turns),
        shares=tuple(reader.shares),
        products=reader.products,
        places=math.prod(grid),
        blocks=float(sum(size * math.prod(grid) for size, _ in sizes)),
        moved=float(sum(size * moves for size, moves in sizes)),
        seldom=reader.seldom,
        times=times,
    )


def _block_bytes(block: Any) -> int:
    """Bytes of a block that the grid's pipeline moves between HBM and VMEM; 0 if it lies elsewhere."""
    aval = block.transformed_block_aval
    if "any" in str(aval.memory_space) or "smem" in str(aval.memory_space) or "hbm" in str(aval.memory_space):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def _moves(block: Any, grid: list[int]) -> int:
    """At how many places of the grid a block is another than before; at all, if nobody knows."""
    places = math.prod(grid)
    reader = _Reader(grid)
    program = block.index_map_jaxpr.jaxpr
    arguments = [*reader.places, *[None] * (len(program.invars) - len(grid))]
    index = reader.run(program, arguments, np.ones(places))
    if places == 0 or any(number is None for number in index):
        return places
    index = np.stack([np.broadcast_to(number, places) for number in index])
    return 1 + int(np.count_nonzero(np.any(index[:, 1:] != index[:, :-1], axis=0)))


class _Reader:
    """Follows the whole numbers of a kernel through all places of its grid; None is what is not known."""

    def __init__(self, grid: list[int]):
        self.places = np.indices(grid).reshape(len(grid), math.prod(grid))
        self._grid = grid
        self.turns: list[float] = []
        self.shares: list[float] = []
        self.products = 0.0
        self.seldom = 0.0
        self._loop_runs = np.ones(math.prod(grid))

    def run(self, program: Any, arguments: list[Any], runs: np.ndarray) -> list[Any]:
        """Return the results; `runs` [P] is how often the program runs at each place."""
        known = dict(zip(program.invars, arguments, strict=True))

        def value(atom: Any) -> Any:
            if hasattr(atom, "val"):
                return np.asarray(atom.val) if _is_whole(atom) else None
            return known.get(atom)

        for equation in program.eqns:
            name, inputs = equation.primitive.name, [value(atom) for atom in equation.invars]
            results = [None] * len(equation.outvars)
            if name == "program_id":
                results = [self.places[equation.params["axis"]]]
            elif name == "num_programs":
                results = [np.asarray(self._grid[equation.params["axis"]])]
            elif name == "dot_general":
                self.products += float(np.sum(runs)) * _product(equation)
            elif name == "while":
                self._loop(equation, inputs, runs)
            elif name == "cond":
                self._branch(equation, inputs, runs)
            elif name in _ARITHMETIC and _is_whole(*equation.outvars) and all(x is not None for x in inputs):
                results = [_ARITHMETIC[name](*inputs)]
            else:
                again = runs * equation.params.get("length", 1) if name == "scan" else runs
                for inner in _inner(equation):
                    whole = name != "scan" and len(inner.invars) == len(inputs)
                    found = self.run(inner, inputs if whole else [None] * len(inner.invars), again)
                    if whole and len(found) == len(results):
                        results = found
            known.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in program.outvars]

    def _loop(self, equation: Any, inputs: list[Any], runs: np.ndarray) -> None:
        """A `fori_loop`: its first two numbers are where it starts and where it ends."""
        body = equation.params["body_jaxpr"]
        start = equation.params["cond_nconsts"] + equation.params["body_nconsts"]
        first, last = [*inputs[start : start + 2], None, None][:2]
        known = first is not None and last is not None
        turns = np.maximum(0, last - first) if known else np.asarray([_expected(equation)])
        if not known or turns.size > 1:  # else the compiler knows it, too
            self.turns.append(float(np.mean(turns * (runs > 0))))
        constants = inputs[equation.params["cond_nconsts"] : start]
        inner = getattr(body, "jaxpr", body)
        rest = [None] * (len(inner.invars) - len(constants))
        around, self._loop_runs = self._loop_runs, runs * turns
        self.run(inner, [*constants, *rest], runs * turns)
        self._loop_runs = around

    def _branch(self, equation: Any, inputs: list[Any], runs: np.ndarray) -> None:
        for number, branch in enumerate(equation.params["branches"]):
            branch = getattr(branch, "jaxpr", branch)
            taken = runs if inputs[0] is None else runs * (inputs[0] == number)
            if SELDOM in str(equation.source_info.name_stack):
                self.seldom += float(np.sum(runs)) * _copied(branch)
                taken = np.zeros_like(runs)
            if _multiplies(branch):
                self.shares.append(float(np.sum(taken) / max(1.0, np.sum(self._loop_runs))))
            self.run(branch, inputs[1:], taken)


def _expected(equation: Any) -> float:
    """Turns of a loop that depend on data, as the kernel expects them; 1 where it says nothing."""
    scope = str(equation.source_info.name_stack).rpartition("/")[2]
    return float(scope.removeprefix(TURNS)) if scope.startswith(TURNS) else 1.0


def _multiplies(program: Any) -> bool:
    """Whether it has a matrix product that is in no loop and no other branch."""
    return any(
        equation.primitive.name == "dot_general"
        or (
            equation.primitive.name not in ("while", "scan", "cond")
            and any(_multiplies(inner) for inner in _inner(equation))
        )
        for equation in program.eqns
    )


def _copied(program: Any) -> int:
    """Bytes of the copies that a program starts; of its two ends the smaller one is what is copied."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dma_start":
            ends = [atom.aval for atom in equation.invars if getattr(atom.aval, "shape", ())]
            total += min(math.prod(end.shape) * end.dtype.itemsize for end in ends)
        total += sum(_copied(inner) for inner in _inner(equation))
    return total


def _is_whole(*atoms: Any) -> bool:
    """Whether these are scalars of whole numbers or truth values, as loops' bounds are."""
    return all(atom.aval.shape == () and atom.aval.dtype.kind in "iub" for atom in atoms)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[n] for n in contracted)

"""What a compiled step sends between chips: kind, bytes, over which axes of the mesh, and how long it takes.

Times are estimates: bytes over the vendor's bandwidth of the links that the axes lie along, both ways round
where they are closed to a ring, without latencies and as if no other operation used them. With n chips and S
bytes of the whole array, gathering and scattering take S (n - 1) / n over all links of a chip along the axes,
an all-reduce twice that, a permutation S over one link; an all-to-all of S bytes a chip moves half of them
through the middle of the longest side. Between slices, n of them, the same shares of what a chip sends there
pass the network.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from mc_jax.planning.chips import Chip
from mc_jax.planning.program import Operation
from mc_jax.planning.topology import Topology

_KIND = re.compile(
    r" (all-gather|all-reduce|reduce-scatter-of|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
_BETWEEN_SLICES = re.compile(r' send\(.*_xla_megascale_transfer_type="(\w+)"')
_BETWEEN_SLICES_KINDS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(.*?)\}\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A kind of sending, of equal arrays over equal axes, in a step."""

    kind: str
    """The HLO opcode, such as "all-gather"."""
    axes: tuple[str, ...]
    """Mesh axes of more than one chip that it runs along."""
    chips: int
    """Chips in a replica group; for a cross-slice collective, slices."""
    bytes: int
    """Size of the array that is gathered, summed or divided; in other collectives, what one chip sends."""
    times: int
    """How often it runs in a step."""
    overlaps: bool
    """Whether the compiler lets other work go on meanwhile."""
    seconds: float
    """Estimated time of one run."""
    network: bool = False
    """Whether it goes between slices, over the network, beside what chips of a slice send each other."""


def collectives(
    operations: Iterable[Operation], mesh: jax.sharding.Mesh, chip: Chip, topology: Topology
) -> tuple[Collective, ...]:
    """Return all that a program sends, what takes longest first."""
    found: dict[Collective, int] = {}
    for operation in operations:
        if operation.collective is not None:
            one = read_collective(operation, mesh, chip, topology)
            found[one] = found.get(one, 0) + operation.times
    counted = [dataclasses.replace(one, times=times) for one, times in found.items()]
    return tuple(sorted(counted, key=lambda one: -one.times * one.seconds))


def read_collective(
    operation: Operation, mesh: jax.sharding.Mesh, chip: Chip, topology: Topology
) -> Collective:
    """Return what an operation sends, once."""
    line = operation.collective
    assert line is not None
    if _BETWEEN_SLICES.search(line):
        return _between_slices(line, mesh, chip)
    kind = _KIND.search(line)
    assert kind is not None, line
    name, starts = kind[1], kind[2] is not None
    group = group_of(line, mesh.devices.shape, mesh.axis_names)
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    varying = [axis for axis, at in zip(mesh.axis_names, places, strict=True) if len(set(at.tolist())) > 1]
    sizes = [_bytes(*array) for array in _ARRAY.findall(line[: kind.start()].partition(" = ")[2])]
    # What starts has operand, result and flags.
    size = max(sizes) if starts and name in ("all-gather", "collective-permute") else sum(sizes)
    if name == "reduce-scatter":
        size *= len(group)
    name = name.removesuffix("-of")
    devices = [mesh.devices.flat[index] for index in group]
    return Collective(
        kind=name,
        axes=tuple(varying),
        chips=len(group),
        bytes=size,
        times=1,
        overlaps=operation.overlaps,
        seconds=seconds_of(name, size, devices, chip, topology),
    )


def _between_slices(line: str, mesh: jax.sharding.Mesh, chip: Chip) -> Collective:
    """Each chip sends its own; only axes that lie on several slices take part."""
    found = _BETWEEN_SLICES.search(line)
    assert found is not None
    name = _BETWEEN_SLICES_KINDS.get(found[1], "collective-permute")
    slices = np.vectorize(_slice_of)(mesh.devices)
    axes = [axis for at, axis in enumerate(mesh.axis_names) if (slices != slices.take([0], at)).any()]
    count = len(np.unique(slices))
    # What is sent, then flags.
    size = _bytes(*_ARRAY.findall(line.partition(" = ")[2])[0]) * (count if name == "all-gather" else 1)
    return Collective(
        kind=name,
        axes=tuple(axes),
        chips=count,
        bytes=size,
        times=1,
        overlaps=True,
        seconds=_turns(name, count) * size / chip.network,
        network=True,
    )


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def group_of(line: str, shape: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return one group of places in the flattened mesh that send to each other."""
    if pairs := _PAIRS.search(line):
        return [int(n) for n in pairs[1].split("},{")[0].split(",")]
    places = np.arange(math.prod(shape))
    if found := _MESH_GROUPS.search(line):
        inner = [int(size) for size in re.findall(r"=(\d+)", found[1])]
        axes = re.findall(r"'(\w+)'", found[1])
        chosen = re.findall(r"'(\w+)'", found[2])
        grid = np.moveaxis(
            places.reshape(inner), [axes.index(name) for name in chosen], range(-len(chosen), 0)
        )
        return grid.reshape(-1, math.prod(inner[axes.index(name)] for name in chosen))[0].tolist()
    if found := _IOTA_GROUPS.search(line):
        groups, inner = ([int(n) for n in text.split(",")] for text in found.groups()[:2])
        grid = places.reshape(inner)
        if found[3]:
            grid = grid.transpose([int(n) for n in found[3].split(",")])
        return grid.reshape(groups)[0].tolist()
    if found := _LISTED_GROUPS.search(line):
        return [int(n) for n in found[1].split(",")]
    return places.tolist()


def seconds_of(kind: str, size: int, devices: Sequence[jax.Device], chip: Chip, topology: Topology) -> float:
    """Return the time of one run within a slice, an estimate."""
    if len(devices) == 1:
        return 0.0
    sides = _sides(devices, topology, chip)
    if kind == "collective-permute":
        return size / chip.link
    if kind == "all-to-all":
        side, lanes = max(sides, key=lambda one: one[0] / one[1])
        # Half of what a row of `side` chips has crosses its middle, half of that each way.
        return size * side / 4 / lanes / chip.link
    return _turns(kind, len(devices)) * size / (sum(lanes for _, lanes in sides) * chip.link)


def _turns(kind: str, chips: int) -> float:
    if kind == "collective-permute":
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (chips - 1) / chips


def _sides(devices: Sequence[jax.Device], topology: Topology, chip: Chip) -> list[tuple[int, int]]:
    """Dimensions of the torus that devices are spread over: how many along it, a chip's links along it."""
    coordinates = np.array([device.coords for device in devices])
    sides = [len(set(column.tolist())) for column in coordinates.T]
    whole = (*topology.sides, *[1] * len(sides))
    found = [
        (side, 2 if side == whole[at] and side % chip.wraps == 0 else 1)
        for at, side in enumerate(sides)
        if side > 1
    ]
    return found or [(2, 1)]  # the two halves of a chip


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8

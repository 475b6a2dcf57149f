"""What a function costs on a chip that is not here, by the estimates and schedules of its compiler."""

import atexit
import dataclasses
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType

from mc_jax._absent_tpu import quiet_libtpu
from mc_jax.planning.chips import CHIPS, Chip
from mc_jax.planning.program import Operation, operations
from mc_jax.planning.schedule import Loop, read_schedule
from mc_jax.planning.turns import Counts, counts_of, kernel_works

# What transformations put before a kernel's name.
_TRANSFORMED = re.compile(r"^(?:transpose_|jvp_|vmap_|checkpoint_)+")
_schedules: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel of a program."""

    name: str
    """The name given to `pallas_call`."""
    operation: str
    """Its name in the program."""
    calls: int
    """How often it runs."""
    bundles: float
    """Bundles of one run: its cycles if it never has to wait."""
    copied: float
    """Bytes that a run moves between HBM and VMEM."""

    def cycles(self, bytes_per_cycle: float) -> float:
        """Cycles of all runs: compute or copies, whichever take longer."""
        return self.calls * max(self.bundles, self.copied / bytes_per_cycle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a function costs, in cycles of one chip."""

    chip: Chip
    """The chip that it is counted for."""
    operations: tuple[Operation, ...]
    """All but kernels."""
    kernels: tuple[Kernel, ...]
    """Pallas kernels, one entry for each place that calls one."""
    temporary: int
    """Bytes of HBM beside arguments and results."""

    @property
    def bundles(self) -> float:
        """Bundles of all kernels' runs."""
        return sum(kernel.calls * kernel.bundles for kernel in self.kernels)

    @property
    def xla_cycles(self) -> float:
        """Cycles of everything but kernels."""
        return sum(operation.times * operation.cycles for operation in self.operations)

    @property
    def cycles(self) -> float:
        """Cycles in all, kernels' copies charged as the compiler charges operations that stream."""
        return self.xla_cycles + sum(kernel.cycles(self.chip.streaming) for kernel in self.kernels)

    @property
    def cycles_at_peak(self) -> float:
        """Cycles in all, kernels' copies at the peak of HBM."""
        return self.xla_cycles + sum(kernel.cycles(self.chip.bytes_per_cycle) for kernel in self.kernels)


def keep_schedules() -> None:
    """Have libtpu write its kernels' schedules down; call it before anything is compiled for a TPU."""
    global _schedules
    if _schedules is None:
        _schedules = Path(tempfile.mkdtemp(prefix="schedules"))
        atexit.register(shutil.rmtree, _schedules, ignore_errors=True)
        # Without the last, what every pass makes is written: gigabytes of a whole step.
        flags = f"--xla_jf_dump_to={_schedules} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        quiet_libtpu()


def cost_of(
    chip: str,
    function: Callable,
    *shapes,
    donated: tuple[int, ...] = (),
) -> Cost:
    """Compile a function for one chip and read what it costs; `keep_schedules` must have been called.

    Arguments and results have whatever layouts suit: in a model, what is around a function takes them on.
    Loops of kernels that depend on data turn as often as those expect (`pallas_kernels._expected`).

    Args:
      chip: a name in `CHIPS`.
      function: of arrays.
      *shapes: its arguments, trees of `jax.ShapeDtypeStruct`.
      donated: which arguments the function may overwrite.
    """
    forget_schedules()
    traced, lowered = lower_anyhow(chip, function, *shapes, donated=donated)
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    found = tuple(operations(text))
    return Cost(
        chip=CHIPS[chip],
        operations=tuple(operation for operation in found if not operation.is_kernel),
        kernels=kernels_of(found, counts_of(kernel_works(traced.jaxpr.jaxpr))),
        temporary=memory.temp_size_in_bytes,
    )


def lower_anyhow(
    chip: str, function: Callable, *shapes, donated: tuple[int, ...] = ()
) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    """Trace and lower a function for one chip, its arguments and results in layouts that the compiler picks.

    Args: as of `cost_of`.
    """
    described = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
    mesh = jax.sharding.Mesh(described.devices[:1], "chip", axis_types=(AxisType.Auto,))
    anyhow = Format(Layout.AUTO, jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=anyhow, out_shardings=anyhow, donate_argnums=donated)
        traced = jitted.trace(*shapes)
        return traced, traced.lower()


def forget_schedules() -> None:
    """Delete what libtpu has written, before something is compiled whose kernels may have the same names."""
    assert _schedules is not None
    for path in _schedules.iterdir():
        path.unlink()


def has_schedules() -> bool:
    """Whether libtpu writes schedules down, and has written some."""
    return _schedules is not None and any(_schedules.iterdir())


def kernels_of(
    found: Iterable[Operation],
    counts: Callable[[str], Counts] = lambda kernel: Counts(),
) -> tuple[Kernel, ...]:
    """Return the kernels of the program that was compiled last; `counts` are as of `counts_of`."""
    calls = Counter()
    for operation in found:
        if operation.is_kernel:
            calls[operation.name] += operation.times
    kernels = []
    for name, times in calls.items():
        loop = _schedule(name)
        pallas_name = kernel_name(name)
        count = counts(pallas_name)
        cores = _at_places(loop, count)
        kernels.append(
            Kernel(
                name=pallas_name,
                operation=name,
                calls=times,
                bundles=loop.cycles(count.each_turns(), count.shares),
                # The schedule copies each block at each place, of which some stay, and all that is seldom.
                copied=max(cores * loop.bytes(count.each_turns()) - count.blocks - count.seldom, 0.0)
                + count.moved,
            )
        )
    return tuple(kernels)


def _at_places(kernel: Loop, count: Counts) -> int:
    """Let the loop over the grid turn once a place, and return how many cores share it.

    A pipeline makes a turn or two more, in which blocks come or go and nothing is computed.
    """
    for loop in kernel.loops:
        for cores in (1, 2):
            places = count.places / cores
            if loop.turns is not None and 0 <= loop.turns - places <= 2 < places:
                loop.turns = round(places)
                return cores
    return 1


def kernel_name(operation: str) -> str:
    """Return the name given to `pallas_call` of an operation's name."""
    return _TRANSFORMED.sub("", operation.partition(".")[0]).strip("_")


def _schedule(operation: str) -> Loop:
    assert _schedules is not None
    # Of calls of one kernel on equal shapes libtpu may compile one and write its schedule alone.
    for pattern in (operation, f"{operation.partition('.')[0]}.*", operation.partition(".")[0]):
        files = [
            path
            for path in _schedules.glob(f"*-{pattern}-*-final_bundles.txt")
            if "schedule-analysis" not in path.name
        ]
        if files:
            return read_schedule(max(files).read_text(errors="replace"))
    raise AssertionError(f"libtpu wrote no schedule of {operation}")

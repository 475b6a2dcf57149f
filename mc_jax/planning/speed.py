"""How long a compiled step takes, by its compiler's estimates: no chip has run it."""

import dataclasses
from collections.abc import Callable, Sequence

from mc_jax.planning.chips import Chip
from mc_jax.planning.collectives import Collective
from mc_jax.planning.cost import Kernel
from mc_jax.planning.parts import operation_part, operation_work
from mc_jax.planning.program import Operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Operations of a part of the model that do the same."""

    part: str
    """The part of the model that traced them, such as "MLP"."""
    work: str
    """What they do, such as "matrix products"."""
    forward: float
    """Cycles in a step."""
    backward: float
    """Cycles in a step, of the gradient and of what is computed again for it."""

    @property
    def cycles(self) -> float:
        """Cycles of both."""
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dear:
    """An operation that takes long."""

    name: str
    """Its name in the program."""
    part: str
    """See `Group`."""
    work: str
    """See `Group`."""
    source: str
    """The traced operation, as JAX names it."""
    times: int
    """How often it runs in a step."""
    cycles: float
    """Cycles of all its runs in a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Estimates for one chip in a step."""

    xla_cycles: float
    """XLA's ops by the compiler's model, times trip counts; it grants streams some 40 % of HBM's peak."""
    kernel_cycles: float
    """Pallas kernels: bundles of their schedules, or copies at that same rate if these take longer."""
    compute_seconds: float
    """Both, at the chip's clock."""
    communication_seconds: float
    """Time of all collectives one after another, at the vendor's bandwidths."""
    overlapping_seconds: float
    """The share of that time in collectives that let other work go on."""
    seconds: float
    """Step time, each transfer overlapping compute between its start and its done op."""
    least_seconds: float
    """Step time if compute, links and the network between slices overlapped fully."""
    most_seconds: float
    """Step time if nothing overlapped."""
    tokens_per_second: float
    """Throughput of all chips together."""
    mfu: float
    """Share of the chips' peak that the FLOPs by formula make up."""
    products: float
    """FLOPs of the program's matrix products on a chip, loops multiplied out, those of kernels included."""
    groups: tuple[Group, ...]
    """All operations, what takes longest first."""
    dearest: tuple[Dear, ...]
    """Single ones that take longest."""


def speed_of(
    operations: Sequence[Operation],
    kernels: Sequence[Kernel],
    sent: Sequence[Collective],
    sending: Callable[[Operation], Collective],
    chip: Chip,
    *,
    chips: int,
    tokens: int,
    flops: float,
    kernel_products: float,
    dearest: int = 12,
) -> Speed:
    """Return the estimate.

    Args:
      operations: of the program.
      kernels: likewise.
      sent: what it sends.
      sending: what one of its operations that sends does.
      chip: where.
      chips: how many of these.
      tokens: of a step, on all chips.
      flops: by formula, of a step, on all chips.
      kernel_products: FLOPs of the kernels' matrix products, on a chip.
      dearest: how many single operations to name.
    """
    per_call = {kernel.operation: kernel.cycles(chip.streaming) / kernel.calls for kernel in kernels}
    groups: dict[tuple[str, str], list[float]] = {}
    single: dict[str, Dear] = {}
    xla = kernel_cycles = 0.0
    clock = _Clock()
    for one in operations:
        cycles = one.times * (per_call[one.name] if one.is_kernel else one.cycles)
        clock.run(one, cycles / chip.clock, sending(one) if one.collective else None)
        if not cycles:
            continue
        if one.is_kernel:
            kernel_cycles += cycles
        else:
            xla += cycles
        part, work = operation_part(one), operation_work(one)
        groups.setdefault((part, work), [0.0, 0.0])[one.is_backward] += cycles
        before = single.get(one.name)
        single[one.name] = Dear(
            name=one.name,
            part=part,
            work=work,
            source=one.source,
            times=one.times + (before.times if before else 0),
            cycles=cycles + (before.cycles if before else 0.0),
        )
    compute = (xla + kernel_cycles) / chip.clock
    between = sum(one.times * one.seconds for one in sent if one.network)
    communication = sum(one.times * one.seconds for one in sent)
    return Speed(
        xla_cycles=xla,
        kernel_cycles=kernel_cycles,
        compute_seconds=compute,
        communication_seconds=communication,
        overlapping_seconds=sum(one.times * one.seconds for one in sent if one.overlaps),
        seconds=clock.now,
        least_seconds=max(compute, communication - between, between),
        most_seconds=compute + communication,
        tokens_per_second=tokens / clock.now,
        mfu=flops / chips / chip.flops / clock.now,
        products=kernel_products + sum(one.times * one.products for one in operations),
        groups=tuple(
            sorted(
                (Group(part=p, work=w, forward=f, backward=b) for (p, w), (f, b) in groups.items()),
                key=lambda group: -group.cycles,
            )
        ),
        dearest=tuple(sorted(single.values(), key=lambda one: -one.cycles)[:dearest]),
    )


class _Clock:
    """Time as operations run one after another, and beside them one sending after another, of each network.

    All turns of a loop are one here, as much longer: what a turn begins to send it waits for, too.
    """

    def __init__(self):
        self.now = 0.0
        self._sent = {False: 0.0, True: 0.0}
        """When the links of a slice, and the network between slices, will be free."""
        self._ends: dict[str, float] = {}
        """Start op -> the time at which its transfer will be done."""

    def run(self, operation: Operation, computing: float, sending: Collective | None) -> None:
        """Let an operation run, which computes for so many seconds, and what it sends."""
        self.now += computing
        if sending:
            ends = max(self.now, self._sent[sending.network]) + operation.times * sending.seconds
            self._sent[sending.network] = ends
            if operation.overlaps:
                self._ends[operation.name] = ends
            else:
                self.now = ends
        if operation.waits_for:
            self.now = max(self.now, self._ends.get(operation.waits_for, 0.0))

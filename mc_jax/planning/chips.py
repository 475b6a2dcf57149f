"""What the chips can do."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU as one JAX device; of a v4 or tpu7x, whose chips hold two cores, that is a half."""

    topology: str
    """The smallest that can be compiled for."""
    clock: float
    """Cycles a second."""
    bandwidth: float
    """Bytes a second of HBM, at its peak."""
    flops: float
    """A second, at the peak, in bfloat16."""
    memory: float
    """Bytes of HBM."""
    streaming: float
    """Bytes a cycle that the compiler's estimates grant an elementwise operation: some 40 % of the peak."""

    @property
    def flops_per_cycle(self) -> float:
        """At the peak."""
        return self.flops / self.clock

    @property
    def bytes_per_cycle(self) -> float:
        """At the peak of HBM."""
        return self.bandwidth / self.clock


# Vendor's figures; `streaming` was read off estimates for elementwise operations on 2 GiB.
CHIPS = {
    "v4": Chip(
        topology="v4:2x2x1", clock=1.05e9, bandwidth=0.6e12, flops=137.5e12, memory=16e9, streaming=226
    ),
    "v5e": Chip(topology="v5e:2x2", clock=1.5e9, bandwidth=0.82e12, flops=197e12, memory=16e9, streaming=222),
    "v5p": Chip(
        topology="v5p:2x2x1", clock=1.75e9, bandwidth=2.77e12, flops=459e12, memory=95e9, streaming=574
    ),
    "v6e": Chip(
        topology="v6e:2x2", clock=1.75e9, bandwidth=1.64e12, flops=918e12, memory=32e9, streaming=379
    ),
    "tpu7x": Chip(
        topology="tpu7x:2x2x1", clock=2.2e9, bandwidth=3.7e12, flops=1153.5e12, memory=96e9, streaming=633
    ),
}

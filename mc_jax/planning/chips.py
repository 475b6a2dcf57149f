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
    link: float
    """Bytes a second that one link to a neighbouring chip (ICI) carries each way."""
    network: float
    """Bytes a second to another slice, over the data center's network (DCN)."""
    wraps: int
    """A side of the topology that is a multiple of this has its ends joined."""

    @property
    def flops_per_cycle(self) -> float:
        """At the peak."""
        return self.flops / self.clock

    @property
    def bytes_per_cycle(self) -> float:
        """At the peak of HBM."""
        return self.bandwidth / self.clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, for which nothing is compiled."""

    flops: float
    """A second, at the peak, in bfloat16 without sparsity."""
    memory: float
    """Bytes."""


# Vendor's figures: pages of TPU versions at docs.cloud.google.com/tpu. Bandwidth between chips there is that
# of all links both ways: 400 GB/s of 4 links on v5e, 800 of 4 on v6e, 600 of 6 on v4, 1,200 of 6 on v5p and
# tpu7x; a device of v4 or tpu7x, half a chip, has half of each link. To other slices 25 Gbit/s a chip on v5e
# (6.4 Tbit/s a pod of 256), 50 on v5p (for want of a figure on v4, too), 100 on v6e and tpu7x.
# `streaming` was read off estimates for elementwise operations on 2 GiB.
CHIPS = {
    "v4": Chip(
        topology="v4:2x2x1",
        clock=1.05e9,
        bandwidth=0.6e12,
        flops=137.5e12,
        memory=16e9,
        streaming=226,
        link=25e9,
        network=3.1e9,
        wraps=4,
    ),
    "v5e": Chip(
        topology="v5e:2x2",
        clock=1.5e9,
        bandwidth=0.82e12,
        flops=197e12,
        memory=16e9,
        streaming=222,
        link=50e9,
        network=3.1e9,
        wraps=16,
    ),
    "v5p": Chip(
        topology="v5p:2x2x1",
        clock=1.75e9,
        bandwidth=2.77e12,
        flops=459e12,
        memory=95e9,
        streaming=574,
        link=100e9,
        network=6.2e9,
        wraps=4,
    ),
    "v6e": Chip(
        topology="v6e:2x2",
        clock=1.75e9,
        bandwidth=1.64e12,
        flops=918e12,
        memory=32e9,
        streaming=379,
        link=100e9,
        network=12.5e9,
        wraps=16,
    ),
    "tpu7x": Chip(
        topology="tpu7x:2x2x1",
        clock=2.2e9,
        bandwidth=3.7e12,
        flops=1153.5e12,
        memory=96e9,
        streaming=633,
        link=50e9,
        network=6.2e9,
        wraps=4,
    ),
}

# Data sheets of A100 SXM, H100 SXM, H200 SXM and B200.
GPUS = {
    "a100": Gpu(flops=312e12, memory=80e9),
    "h100": Gpu(flops=989e12, memory=80e9),
    "h200": Gpu(flops=989e12, memory=141e9),
    "b200": Gpu(flops=2250e12, memory=180e9),
}

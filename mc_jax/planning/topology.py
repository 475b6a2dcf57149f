"""Topologies by name, such as "v5p:4x4x4" or "h100:8", and the devices they stand for."""

import dataclasses
import importlib.util

import jax
from jax.experimental import topologies

from mc_jax.planning.chips import CHIPS
from mc_jax.slices import EXAMPLES, read_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips and how they are joined."""

    name: str
    """Its name as libtpu writes it, such as "v5p:4x4x4"; GPUs have one such as "h100:8"."""
    chip: str
    """A name in `CHIPS` or `GPUS`."""
    sides: tuple[int, ...]
    """Chips along each dimension of the torus; of GPUS, their number."""
    slices: int
    """How many of these, joined by a network."""

    @property
    def is_tpu(self) -> bool:
        """Whether it can be compiled for."""
        return self.chip in CHIPS

    @property
    def title(self) -> str:
        """Its name, with the number of slices if there are several."""
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

    def devices(self) -> list[jax.Device]:
        """The devices of TPUs that are not here.

        Raises:
          ValueError: libtpu is not installed, or knows no such topology.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                "libtpu, which compiles for TPUs, is not installed: scripts/setup aot, or "
                "pip install libtpu; GPUs are planned without it"
            )
        several = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **several).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"libtpu knows no topology {self.name!r} ({_first_line(error)}); known are such as {EXAMPLES}"
            ) from error


def read_topology(name: str, slices: int = 1) -> Topology:
    """Return what a name stands for (`mc_jax.slices.read_slice`).

    Raises:
      ValueError: a name that is none, a chip that nobody has figures of, or a slice that is not sold.
    """
    chip, sides = read_slice(name)
    if slices < 1:
        raise ValueError(f"{slices} slices of {name!r} have no chips; set all numbers to 1 or more")
    return Topology(name=f"{chip}:{'x'.join(map(str, sides))}", chip=chip, sides=sides, slices=slices)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]

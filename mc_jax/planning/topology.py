"""Names of topologies, such as "v5p:4x4x4" or "h100:8", and the devices they stand for."""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from mc_jax.planning.chips import CHIPS, GPUS

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2, h100:8"
_NAME = re.compile(r"^([a-z0-9]+):(\d+(?:x\d+)*)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips and how they are joined."""

    name: str
    """The topology as the user wrote it."""
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
    """Return what a name stands for.

    Raises:
      ValueError: a name that is none, or a chip that nobody has figures of.
    """
    found = _NAME.match(name)
    chips = ", ".join([*CHIPS, *GPUS])
    if found is None:
        raise ValueError(f"there is no topology {name!r}; write CHIP:SIZES, such as {EXAMPLES}")
    chip, sides = found[1], tuple(int(side) for side in found[2].split("x"))
    if chip not in CHIPS and chip not in GPUS:
        raise ValueError(
            f"there is no chip {chip!r} in topology {name!r}; known are {chips}; such as {EXAMPLES}"
        )
    if chip in GPUS and len(sides) > 1:
        raise ValueError(f"GPUs have a number, not sides as in {name!r}; write {chip}:{math.prod(sides)}")
    if 0 in sides or slices < 1:
        raise ValueError(f"{slices} slices of {name!r} have no chips; set all numbers to 1 or more")
    return Topology(name=name, chip=chip, sides=sides, slices=slices)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]

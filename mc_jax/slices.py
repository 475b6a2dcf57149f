"""The slices of TPUs and the GPUs that can be rented, by the names that the field writes for them."""

import dataclasses
import functools
import itertools
import math
import re

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e-256, tpu7x:2x2x2, h100:8"
GPU_NAMES = ("a100", "h100", "h200", "b200")
_NAME = re.compile(r"(?:tpu-)?([a-z0-9]+)([:-])(\d+(?:x\d+)*)")
_ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuFamily:
    """What the vendor rents of a TPU."""

    cores: int
    """TensorCores of a chip, which the number in a name such as v5p-128 counts."""
    chips: int
    """Chips of the largest slice."""
    smallest: tuple[tuple[int, ...], ...]
    """Sides of the slices that are no whole cubes of 4 x 4 x 4 chips."""
    cubes: bool
    """Whether whole cubes are joined to larger slices."""


# Sides: the tables of docs.cloud.google.com/tpu/docs/v5e and /v6e (two dimensions, up to 256 chips), /v4,
# /v5p and /tpu7x (three). Above 64 chips whole cubes are joined, A <= B <= C and multiples of 4, as
# docs.cloud.google.com/tpu/docs/types-topologies states it; not each is in every zone. Of tpu7x:1x1x1 and of
# names that count TensorCores: src/xpk/core/system_characteristics.py of github.com/AI-Hypercomputer/xpk at
# 073d687. The pages' accelerator types agree: v4-8 and v5p-8 have four chips of two cores, v5litepod-8 and
# v6e-8 eight of one.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
TPU_FAMILIES = {
    "v4": TpuFamily(cores=2, chips=4096, smallest=_PARTS_OF_A_CUBE, cubes=True),
    "v5e": TpuFamily(cores=1, chips=256, smallest=_FLAT, cubes=False),
    "v5p": TpuFamily(cores=2, chips=8960, smallest=_PARTS_OF_A_CUBE, cubes=True),
    "v6e": TpuFamily(cores=1, chips=256, smallest=_FLAT, cubes=False),
    "tpu7x": TpuFamily(cores=2, chips=9216, smallest=((1, 1, 1), *_PARTS_OF_A_CUBE), cubes=True),
}


def read_slice(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the chip, and the sides of a slice of TPUs or the number of GPUs, that a name stands for.

    Args:
      name: sides after a chip, v5p:4x4x4; the vendor's name, v5p-128 (v4, v5p and tpu7x count TensorCores,
        two a chip; v5e and v6e chips) or v5litepod-16; a number of GPUs, H100:8. Case does not matter.

    Raises:
      ValueError: a name that is none, a chip that nobody has figures of, or a slice that is not sold.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise ValueError(f"there is no topology {name!r}; write CHIP:SIZES, such as {EXAMPLES}")
    chip, sides = _ALIASES.get(found[1], found[1]), tuple(int(side) for side in found[3].split("x"))
    if chip not in TPU_FAMILIES and chip not in GPU_NAMES:
        known = ", ".join([*TPU_FAMILIES, *GPU_NAMES])
        raise ValueError(
            f"there is no chip {chip!r} in topology {name!r}; known are {known}; such as {EXAMPLES}"
        )
    if 0 in sides:
        raise ValueError(f"topology {name!r} has no chips; set all numbers to 1 or more")
    if chip in GPU_NAMES:
        if len(sides) > 1:
            raise ValueError(f"GPUs have a number, not sides as in {name!r}; write {chip}:{math.prod(sides)}")
        return chip, sides
    return chip, _sold(name, chip, sides, is_count=len(sides) == 1 and found[2] == "-")


def _sold(name: str, chip: str, sides: tuple[int, ...], *, is_count: bool) -> tuple[int, ...]:
    """Return the sides of a slice of TPUs if it is sold."""
    family = TPU_FAMILIES[chip]
    if is_count:
        wanted = sides[0] / family.cores
        sides = next((one for one in _slices_of(chip) if math.prod(one) == wanted), sides)
    if sides in _slices_of(chip):
        return sides
    # A number after a colon might count chips or cores: which of them is not guessed.
    chips = math.prod(sides) / (family.cores if is_count else 1)
    nearest = min(_slices_of(chip), key=lambda one: abs(math.log(math.prod(one) / chips)))
    raise ValueError(
        f"no slice of {chip} that is sold is {name!r}; there are {_offer(family)}; "
        f"write {chip}:{_written(nearest)}, its nearest, or {chip}-{math.prod(nearest) * family.cores}"
    )


@functools.cache
def _slices_of(chip: str) -> tuple[tuple[int, ...], ...]:
    """Sides of all slices of a TPU; of those with equally many chips the most like a cube comes first."""
    family = TPU_FAMILIES[chip]
    if not family.cubes:
        return family.smallest
    sides = range(4, family.chips // 16 + 1, 4)
    cubes = (
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sides, 2)
        if a * b * b <= family.chips
        for c in range(b, family.chips // (a * b) + 1, 4)
    )
    return (*family.smallest, *sorted(cubes, key=lambda one: (math.prod(one), sum(one))))


def _offer(family: TpuFamily) -> str:
    smallest = ", ".join(map(_written, family.smallest))
    if not family.cubes:
        return smallest
    larger = f"ascending multiples of 4 up to {family.chips:,} chips, such as 4x4x4, 4x4x8"
    return f"{smallest} and {larger}"


def _written(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))

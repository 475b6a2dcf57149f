"""Which axes of the mesh the dimensions of arrays lie over, by their names.

The mesh is that of `jax.set_mesh`. Without one, or on one device, or on a mesh with other axes, nothing here
has any effect.
"""

import dataclasses
import math

import jax

from mc_jax.parallel.mesh import AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Axes of the mesh for each name; a dimension without a name is whole on every device."""

    batch: tuple[str, ...] = ("replica", "fsdp")
    """Rows."""
    tokens: tuple[str, ...] = ("sequence",)
    """Tokens of a row, by runs of whole segments."""
    model: tuple[str, ...] = ("fsdp",)
    """The width of the residual stream, of parameters; activations have it whole."""
    heads: tuple[str, ...] = ("tensor",)
    """Heads, and features that are grouped by head."""
    mlp: tuple[str, ...] = ("tensor",)
    """Hidden features of a block's MLP."""
    vocab: tuple[str, ...] = ("tensor",)
    """The vocabulary, where it can be divided: 259 bytes cannot."""
    hidden: tuple[str, ...] = ("fsdp",)
    """Hidden features of the MLP that a memory starts from, where they can be divided."""


RULES = Rules()
WHERE_IT_DIVIDES = ("vocab", "hidden")
"""Names of dimensions that stay whole on a mesh that does not divide them."""


def spec(*names: str | None) -> jax.P:
    """The spec on the current mesh of an array whose first dimensions have these names.

    Of all ways to say it, it is the shortest, as the compiler's: a step that returns its state laid out as it
    took it, but in other words, would be compiled again.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = [tuple(axis for axis in axes_of(name) if sizes[axis] > 1) for name in names]
    while axes and not axes[-1]:
        axes.pop()
    return jax.P(*(None if not some else some[0] if len(some) == 1 else some for some in axes))


def whole_spec(*names: str | None) -> jax.P:
    """The same as `spec`, with the axes that have one device."""
    return jax.P(*(axes_of(name) for name in names))


def axes_of(name: str | None) -> tuple[str, ...]:
    """The axes of the mesh that a dimension lies over."""
    return () if name is None else getattr(RULES, name)


def size_of(name: str) -> int:
    """Devices that a dimension lies over; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes_of(name)) if has_mesh() else 1


def has_mesh() -> bool:
    """Whether the current mesh is one of `make_mesh`."""
    return jax.sharding.get_abstract_mesh().axis_names == AXES


def is_sharded() -> bool:
    """Whether it has more than one device, too."""
    return has_mesh() and jax.sharding.get_abstract_mesh().size > 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tell the compiler where x lies, in a traced program."""
    return jax.lax.with_sharding_constraint(x, spec(*names)) if is_sharded() else x

"""The branch of an MLP memory, what it adds to its query: a function of z = gelu(x W_in) W_out.

"plain" is z itself. Written chunk by chunk, such a memory grows without bound where keys hardly change.
"bounded" is z / sqrt(1 + mean(z^2)): z while that is small, never longer than sqrt(V), with a gradient of at
most z's.

V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._state import Weights

BRANCHES = ("bounded", "plain")


@dataclasses.dataclass(frozen=True)
class Branch:
    """A branch, and where the values of a read lie in an array.

    Raises:
      ValueError: a name that is not known.
    """

    name: str
    """One of `BRANCHES`."""
    axis: int = -1
    """Along which the values of one read lie."""
    dim: int | None = None
    """How many they are, where zeros follow them; None: all."""

    def __post_init__(self):
        if self.name not in BRANCHES:
            raise ValueError(f"branch is {self.name!r}; choose one of {', '.join(BRANCHES)}")

    @property
    def is_bounded(self) -> bool:
        """The branch depends on the length of z."""
        return self.name == "bounded"

    def of(self, z: jax.Array) -> jax.Array:
        """Return the branch of z, in z's dtype."""
        return z * self._scale(z) if self.is_bounded else z

    def bar(self, z: jax.Array, out_bar: jax.Array) -> jax.Array:
        """Return the gradient of z from that of its branch."""
        return self.bars(z, out_bar)[1] if self.is_bounded else out_bar

    def bars(self, z: jax.Array, out_bar: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return <branch, out_bar>, the gradient of its weight, with one value on the axis; and of z."""
        if not self.is_bounded:
            return jnp.sum(z * out_bar, axis=self.axis, keepdims=True), out_bar
        scale = self._scale(z)
        out = scale * z
        share = self._mean(out * out_bar)
        return share * self._dim(z), scale * (out_bar - out * share)

    def _scale(self, z: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(1 + self._mean(z * z))

    def _mean(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=self.axis, keepdims=True) * (1 / self._dim(x))

    def _dim(self, x: jax.Array) -> int:
        return self.dim or x.shape[self.axis]


def branch_for(states: Weights, name: str | None) -> Branch | None:
    """Return the branch by which states are read: of MLPs "bounded" where none is named, of matrices None.

    Raises:
      ValueError: a branch that is not known, or one of matrices.
    """
    if isinstance(states, tuple):
        return Branch("bounded" if name is None else name)
    if name is not None:
        raise ValueError(f"branch {name!r} has no effect on states that are matrices; leave it out")
    return None

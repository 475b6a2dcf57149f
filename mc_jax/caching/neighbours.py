"""Rows that several devices share: each has a run of whole segments, and few numbers go between them.

What is said here is said inside a `jax.shard_map` over the devices that share a row. Between them go, per row
and head: states at segments' ends, pooled keys, and what a run starts from; and for documents a few numbers
a row. Keys and values stay where they are.

Shapes: B batch, T tokens of a device, S segments of a device, N devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.caching import segments


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The devices that share rows, in the order of their runs."""

    axis: str
    """The mesh's axis that they lie along."""

    @property
    def count(self) -> int:
        """How many they are."""
        return jax.lax.axis_size(self.axis)

    @property
    def index(self) -> jax.Array:
        """The place of this device among them, int32."""
        return jax.lax.axis_index(self.axis)

    def gather[Tree](self, tree: Tree) -> Tree:
        """Leaves [B, S, ...] of all devices put together to whole rows [B, N S, ...]."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, axis=1, tiled=True), tree)

    def collect[Tree](self, tree: Tree) -> Tree:
        """Leaves [...] of all devices, one after the other [N, ...]."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis), tree)

    def from_before[Tree](self, tree: Tree) -> Tree:
        """The tree of the device before; zeros for the first one."""
        pairs = [(place, place + 1) for place in range(self.count - 1)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def normalize_documents(self, document_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Number the documents of whole rows 0, 1, 2, ... as `segments.normalize_documents` does.

        Args:
          document_ids: of this device's tokens [B, T].

        Returns:
          The numbers [B, T], int32, and which tokens go on with the document of the token before this
          device's first [B, T], bool; on the first device, with its first token's.
        """
        within = segments.normalize_documents(document_ids)
        ids = document_ids.astype(jnp.int32)
        facts = jnp.stack([ids[:, 0], ids[:, -1], within[:, -1]], axis=-1)
        first, last, starts = jnp.moveaxis(self.collect(facts), -1, 0)  # [N, B] each
        anew = jnp.pad(first[1:] != last[:-1], ((1, 0), (0, 0)))
        number = jnp.cumsum(anew, axis=0, dtype=jnp.int32) + jnp.cumsum(starts, axis=0) - starts
        goes_on = (within == 0) & ~anew[self.index][:, None]
        return number[self.index][:, None] + within, goes_on

    def reaches(self, at_end: jax.Array, passes: jax.Array) -> jax.Array:
        """Whether what is at the end of a device before gets to this one's first token [B, H], bool.

        Args:
          at_end: whether it is at this device's end, from within [B, H], bool.
          passes: whether what gets to a device's first token gets to its end [B], bool.
        """

        def after(at_start: jax.Array, device: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at_end, passes = device
            return at_end | (at_start & passes[:, None]), at_start

        _, at_starts = jax.lax.scan(after, jnp.zeros_like(at_end), self.collect((at_end, passes)))
        return at_starts[self.index]

"""What a run of a memory would rather have saved for its gradient than run again for.

Outside of `jax.checkpoint`, and under policies that do not name `KEPT`, a mark has no effect.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "memory_run"
"""For policies: `jax.checkpoint_policies.save_only_these_names(KEPT)`."""


def keep[T](tree: T) -> T:
    """Mark arrays as such; the marked ones, not the arguments, must be used from there on."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)

"""What a block saves for its gradient, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mc_jax.config import Remat
from mc_jax.parallel import is_sharded
from mc_jax.parallel.parameters import GATHERED
from pallas_kernels._kept import KEPT

_INPUT = "block_input"


def rematerialize(block: Callable[..., Any], remat: Remat, *, prevent_cse: bool) -> Callable[..., Any]:
    """The function `block` (x, *others), whose gradient is the same and is made as `remat` says.

    Args:
      block: x [B, T, D] is what comes from the block before; the others are parameters and the like.
      remat: "none" saves all that the gradient wants, but not the weights that were gathered for a layer;
        "states" x, and the runs, gates and reads of memories and attention (`pallas_kernels._kept`), so that
        these are not run again (but the runs of MLPs on a TPU); "maps" what linear maps return as well, so
        that only what goes element by element is; "blocks" x alone; "offload" x alone, in the host's memory.
      prevent_cse: keep the compiler from undoing it; not needed in the body of a loop.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none" if is_sharded():
            # A layer's whole weights would otherwise be saved, for all layers at once.
            policy = _is_not_gathered
        case "none":
            return block
        case "maps":
            # Memories multiply per row and head, and by that are told from maps.
            policy = policies.save_from_both_policies(
                policies.save_only_these_names(KEPT), policies.dots_with_no_batch_dims_saveable
            )
        case "states":
            policy = policies.save_only_these_names(KEPT)
        case "blocks":
            policy = policies.nothing_saveable
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )

    def named(x: jax.Array, *others: Any) -> Any:
        # An argument is always saved where it is; what goes to the host is a copy with a name.
        return block(checkpoint_name(x, _INPUT) if remat == "offload" else x, *others)

    return jax.checkpoint(named, policy=policy, prevent_cse=prevent_cse)


def _is_not_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy: the name alone would not do, for what it was given to would be saved in its place."""
    return primitive.name != "sharding_constraint" and parameters.get("name") != GATHERED

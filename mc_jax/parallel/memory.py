"""The functional core on a mesh: each device runs its own rows, tokens and heads.

Rows and heads need nothing of each other. Devices that share a row exchange states, and never keys and values
(`mc_jax.caching.neighbours`).

Shapes: B batch, T tokens, H heads, K key dim, V value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mc_jax import caching
from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.memories import Coefficients
from mc_jax.parallel.rules import RULES, is_sharded, size_of, whole_spec
from pallas_kernels._state import Weights


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: caching.Routing | None,
    coefficients: Coefficients,
    settings: caching.Settings,
    *,
    document_ids: jax.Array | None = None,
    initial_state: Weights | None = None,
    top_k: jax.Array | None = None,
    bad: jax.Array | None = None,
) -> tuple[jax.Array, Gates | Selection | None]:
    """Reads [B, T, H, V] and gates of `caching.forward`, without the cache.

    It is mapped over the mesh by hand: the compiler cannot divide a kernel.

    Args:
      q: [B, T, H, K], as there, like all that follows.
      k: [B, T, H, K].
      v: [B, T, H, V].
      routing: what the router needs.
      coefficients: scalars per token and head.
      settings: static.
      document_ids: [B, T].
      initial_state: [H, ...], the same for all rows.
      top_k: a traced scalar.
      bad: [B, T].

    Raises:
      ValueError: T tokens that the mesh does not cut into runs of whole segments.
    """
    devices = size_of("tokens")
    neighbours = caching.Neighbours(*RULES.tokens) if devices > 1 else None
    if q.shape[1] % (devices * settings.segment_length) and neighbours is not None:
        raise ValueError(
            f"rows of {q.shape[1]} tokens are not {devices} runs of whole segments of "
            f"{settings.segment_length}; pad them to a multiple of {devices * settings.segment_length}, "
            "or set mesh.sequence to 1"
        )

    def run(q, k, v, routing, coefficients, document_ids, initial_state, top_k, bad) -> tuple[jax.Array, Any]:
        return caching.forward_shared(
            q,
            k,
            v,
            routing,
            coefficients,
            settings,
            document_ids=document_ids,
            initial_state=initial_state,
            top_k=top_k,
            bad=bad,
            neighbours=neighbours,
        )

    arguments = (q, k, v, routing, coefficients, document_ids, initial_state, top_k, bad)
    if not is_sharded():
        return run(*arguments)

    def run_part(*arguments) -> tuple[jax.Array, Any]:
        y, gates = run(*arguments)
        # Gates that are the same for all heads have one; the heads of all devices are put side by side.
        heads = y.shape[2]
        return y, jax.tree.map(lambda x: jnp.broadcast_to(x, (*x.shape[:2], heads, *x.shape[3:])), gates)

    # All axes are named, those of one device too: over an axis that is not, gradients would be summed.
    per_head = whole_spec("batch", "tokens", "heads")
    return jax.shard_map(
        run_part,
        in_specs=(
            *[per_head] * 5,
            whole_spec("batch", "tokens"),
            whole_spec("heads"),
            jax.P(),
            whole_spec("batch", "tokens"),
        ),
        out_specs=per_head,
        # Results of kernels do not tell over which axes they vary; here all do over all that matter.
        check_vma=False,
    )(*arguments)

"""What looks a few tokens back, where devices share a row: each brings those tokens from the one before.

Shapes: B batch, T tokens of a device, C tokens before them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mc_jax.parallel.rules import RULES, size_of, spec


def with_tokens_before(
    function: Callable[[Any, Any], jax.Array], count: int, tokens: Any, constants: Any
) -> jax.Array:
    """`function(tokens, constants)` [B, T, ...], of which no result depends on tokens further back.

    Args:
      function: of tokens [B, any number, ...]; before a row's first token there are zeros, or none.
      count: C, how far it looks back.
      tokens: tree of arrays [B, T, ...].
      constants: tree of arrays that are whole on every device that shares a row.
    """
    devices = size_of("tokens")
    if devices == 1 or not count:
        return function(tokens, constants)
    (axis,) = RULES.tokens

    def run(tokens: Any, constants: Any) -> jax.Array:
        pairs = [(place, place + 1) for place in range(devices - 1)]
        before = jax.tree.map(lambda x: jax.lax.ppermute(x[:, -count:], axis, pairs), tokens)
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), before, tokens)
        return function(whole, constants)[:, count:]

    # By hand along the row alone; the compiler divides rows and features as it would without.
    return jax.shard_map(
        run,
        in_specs=(spec(None, "tokens"), jax.P()),
        out_specs=spec(None, "tokens"),
        axis_names=set(RULES.tokens),
        check_vma=False,
    )(tokens, constants)

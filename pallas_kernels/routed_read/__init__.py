"""Reading cached states sparsely: every query reads the few states that are chosen for it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import branch_for
from pallas_kernels._finite import selects_bad, spoilt, states_not_finite, zeroed
from pallas_kernels._platform import on_tpu, platform
from pallas_kernels._state import Weights
from pallas_kernels.routed_read import reference, tpu, xla

__all__ = ["routed_state_read"]


def _xla(q, gates, indices, states, *, branch):
    # A token alone (in decoding) has nothing to share a state with.
    grouped = xla.by_ragged_dot if platform() == "tpu" else xla.in_blocks
    return (grouped if q.shape[1] > 1 else xla.gather)(q, gates, indices, states, branch=branch)


_IMPLEMENTATIONS = {
    "reference": reference.routed_state_read,
    "gather": xla.gather,
    "blocks": xla.in_blocks,
    "ragged_dot": xla.by_ragged_dot,
    "tpu": tpu.routed_state_read,
    "tpu_union": functools.partial(tpu.routed_state_read, kernels=("union",)),
    "tpu_pairs": functools.partial(tpu.routed_state_read, kernels=("pairs",)),
    "xla": _xla,
}


def routed_state_read(
    q: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    states: Weights,
    *,
    branch: str | None = None,
    finite: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """sum_j gates[..., j] M_{indices[..., j]}(q): the read of MC eq. 17, at the cost of k reads a token.

    M(q) is q M of a matrix; of an MLP its branch, without the skip term (`deep_memory`). Tokens that read
    the same state are brought together, so that there are only matrix products.

    Args:
      q: queries [batch, length, heads, key_dim].
      gates: weights [batch, length, heads, k], float32; 0 where there is nothing to read, whatever is there.
      indices: which states [batch, length, heads, k], int32, all in [0, states) whatever their gates; a
        state chosen twice is read twice.
      states: cached matrices [batch, states, heads, key_dim, value_dim], or of MLPs the pair (w_in [batch,
        states, heads, key_dim, hidden], w_out [batch, states, heads, hidden, value_dim]).
      branch: of MLPs "bounded" or "plain"; None: "bounded", or that states are matrices.
      finite: a promise that all states are, where there are several tokens: none is then looked at for it.
      implementation: "tpu", "xla" or "reference"; None picks the best for the platform of the mesh that is
        set (`jax.set_mesh`), or else of the default device. "tpu" is of matrices, float32 and bfloat16, and
        not split over devices by itself: it belongs in a `jax.shard_map` over batch and heads. It is
        "tpu_union" or "tpu_pairs", as suits the indices. "xla" is the best for the platform of "gather",
        "blocks" and "ragged_dot". All these can be asked for as well.

    Returns:
      [batch, length, heads, value_dim] of q's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, no states, a branch of matrices, an unknown
        implementation, or "tpu" where it has no kernel.
    """
    batch, length, heads, key_dim = q.shape
    if gates.shape != indices.shape or gates.ndim != 4 or gates.shape[:3] != (batch, length, heads):
        raise ValueError(
            f"gates {gates.shape} and indices {indices.shape} do not fit q {q.shape}; "
            "give both as [batch, length, heads, k]"
        )
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices are {indices.dtype}; give integers")
    w_in, w_out = states if isinstance(states, tuple) else (states, None)
    # w_in may have any number of states but none; the other axes are fixed.
    fixed = (w_in.shape[0], *w_in.shape[2:4])
    if w_in.ndim != 5 or w_in.shape[1] == 0 or fixed != (batch, heads, key_dim):
        raise ValueError(
            f"states {w_in.shape} do not fit q {q.shape}; "
            "give [batch, states, heads, key_dim, value_dim or hidden] with 1 state or more"
        )
    if w_out is not None and w_out.shape[:-1] != (*w_in.shape[:3], w_in.shape[4]):
        raise ValueError(
            f"w_out {w_out.shape} does not fit w_in {w_in.shape}; "
            "give [batch, states, heads, hidden, value_dim]"
        )
    if implementation is None:
        kernel = length > 1 and on_tpu(q) and tpu.fits(q, indices.shape[3], states)
        implementation = "tpu" if kernel else "xla"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; choose from {names}")
    read = functools.partial(_IMPLEMENTATIONS[implementation], branch=branch_for(states, branch))
    indices = indices.astype(jnp.int32)
    if finite or (length == 1 and implementation == "xla"):
        # A token alone selects by itself: only the states that are read are touched.
        return read(q, gates, indices, states)
    bad = states_not_finite(states)
    out = read(q, gates, indices, zeroed(states, bad))
    return spoilt(out, selects_bad(gates, indices, bad))

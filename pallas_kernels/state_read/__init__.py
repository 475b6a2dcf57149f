"""Reading cached states densely: every query reads every state, weighted by its gate."""

import functools

import jax

from pallas_kernels._branch import branch_for
from pallas_kernels._finite import reads_bad, spoilt, states_not_finite, zeroed
from pallas_kernels._platform import on_tpu
from pallas_kernels._state import Weights
from pallas_kernels.state_read import gpu, reference, tpu, xla

__all__ = ["gated_state_read", "has_hopper_kernel"]

has_hopper_kernel = gpu.has_kernel

_IMPLEMENTATIONS = {
    "gpu": gpu.gated_state_read,
    "reference": reference.gated_state_read,
    "tpu": tpu.gated_state_read,
    "xla": xla.gated_state_read,
}


def gated_state_read(
    q: jax.Array,
    gates: jax.Array,
    states: Weights,
    *,
    branch: str | None = None,
    segment_length: int | None = None,
    finite: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """sum_n gates[..., n] M_n(q): the read of MC eq. 8 (and 6, 14, 16) over cached memories.

    M(q) is q M of a matrix; of an MLP its branch, without the skip term (`deep_memory`).

    Args:
      q: queries [batch, length, heads, key_dim].
      gates: weights [batch, length, heads, states], float32; 0 where a state must not be read, which then
        need not be finite; a read of one that is not is NaN.
      states: cached matrices [batch, states, heads, key_dim, value_dim], or of MLPs the pair (w_in [batch,
        states, heads, key_dim, hidden], w_out [batch, states, heads, hidden, value_dim]).
      branch: of MLPs "bounded" or "plain"; None: "bounded", or that states are matrices.
      segment_length: a promise that gates[:, t, :, n] is 0 unless n < t // segment_length: much of what is
        not read is then skipped, and those gates may get a zero gradient. None: no promise.
      finite: a promise that all states are, where there are several tokens: none is then looked at for it.
      implementation: "tpu", "gpu", "xla" or "reference"; None picks the best for the platform of the mesh
        that is set (`jax.set_mesh`), or else of the default device: on a GPU "xla", since nobody has measured
        "gpu" yet. "tpu" is float32 and bfloat16; "gpu" is for matrices and queries of bfloat16, of a key_dim
        of 256 at most, on Hopper GPUs. Neither is split over devices by itself: they belong in a
        `jax.shard_map` over batch and heads.

    Returns:
      [batch, length, heads, value_dim] of q's dtype.

    Raises:
      ValueError: shapes that do not fit together, a segment_length below 1, a branch of matrices, an
        implementation that is unknown or cannot read these states.
    """
    batch, length, heads, key_dim = q.shape
    if gates.ndim != 4 or gates.shape[:3] != (batch, length, heads):
        raise ValueError(f"gates {gates.shape} do not fit q {q.shape}; give [batch, length, heads, states]")
    leading = (batch, gates.shape[3], heads)
    if isinstance(states, tuple):
        w_in, w_out = states
        if w_in.shape[:-1] != (*leading, key_dim) or w_out.shape[:-1] != (*leading, w_in.shape[-1]):
            raise ValueError(
                f"states {w_in.shape}, {w_out.shape} do not fit q {q.shape} and gates {gates.shape}; "
                "give [batch, states, heads, key_dim, hidden] and [batch, states, heads, hidden, value_dim]"
            )
    elif states.shape[:-1] != (*leading, key_dim):
        raise ValueError(
            f"states {states.shape} do not fit q {q.shape} and gates {gates.shape}; "
            "give [batch, states, heads, key_dim, value_dim]"
        )
    if segment_length is not None and segment_length < 1:
        raise ValueError(f"segment_length is {segment_length}; give 1 or more, or None")
    if implementation is None:
        # A token alone (in decoding) has nothing to share a state with. On a GPU no kernel is the default:
        # what nobody has run may be slow there.
        implementation = "tpu" if length > 1 and on_tpu(q) else "xla"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; choose from {names}")
    read = functools.partial(_IMPLEMENTATIONS[implementation], branch=branch_for(states, branch))
    if finite or (length == 1 and implementation == "xla"):
        # A token alone selects by itself: states are looked at but once.
        return read(q, gates, states, segment_length=segment_length)
    bad = states_not_finite(states)
    out = read(q, gates, zeroed(states, bad), segment_length=segment_length)
    return spoilt(out, reads_bad(gates, bad))

"""The recurrence of an MLP memory: writes by gradients, online reads and the state after every segment.

B batch, T tokens, S segments, H heads, K key dim, V value dim (K = V), E hidden dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._platform import on_tpu
from pallas_kernels._state import OnlineState
from pallas_kernels.deep_memory import reference, tpu, xla
from pallas_kernels.deep_memory.step import check_objective, deep_memory_step

__all__ = ["deep_memory", "deep_memory_step"]

_IMPLEMENTATIONS = {
    "reference": reference.deep_memory,
    "tpu": tpu.deep_memory,
    "xla": xla.deep_memory,
}
_SEGMENT_INITS = ("checkpoint", "independent")


def deep_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    objective: str,
    branch: str = "bounded",
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    segment_length: int,
    segment_init: str = "checkpoint",
    initial_state: tuple[jax.Array, jax.Array] | None,
    start: OnlineState | None = None,
    chunk_length: int = 64,
    document_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    hidden_bias: jax.Array | None = None,
    hidden_gate: jax.Array | None = None,
    implementation: str | None = None,
) -> (
    tuple[jax.Array, tuple[jax.Array, jax.Array], OnlineState]
    | tuple[jax.Array, tuple[jax.Array, jax.Array], OnlineState, jax.Array]
):
    """Write T tokens to an MLP memory per head, and read it after every token and every segment.

    The memory is M(x) = x + branch(z), z = gelu(x W_in) W_out, gelu by its tanh approximation. With a
    retention, h step, m momentum, the gradient taken at the weights that the token's chunk starts from:
      dot  W_t = a W_{t-1} - h grad[-<M(k_t), v_t>] (MC eq. 30, ATLAS eq. 19)
      l2   S_t = m S_{t-1} - h grad[1/2 ||M(k_t) - v_t||^2], W_t = a W_{t-1} + S_t (Titans eq. 13-14)
    Weights, coefficients and writes are kept and computed in float32 (float64 if q is); reads are products in
    q's dtype, accumulated in float32. ("tpu": products of writes are in q's dtype too.)

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K]; of length 1 or so.
      v: values [B, T, H, V], V = K.
      objective: "dot" or "l2".
      branch: "bounded", z / sqrt(1 + mean(z^2)), which stays finite; or "plain", z, as in MC, which need not.
      retention: a [B, T, H] in [0, 1]; None is 1.
      momentum: m [B, T, H] in [0, 1); None is 0. Only "l2".
      step: h [B, T, H]; None is 1.
      previous_step: always None; here because every memory is called alike.
      segment_length: tokens of a segment; S = ceil(T / segment_length), the last one may be short.
      segment_init: "checkpoint", a segment goes on from the last one's weights and momentum; "independent",
        every segment starts from the initial weights, without momentum.
      initial_state: (W_in [H, K, E], W_out [H, E, V]), either with a leading B too. All-zero weights have
        zero gradients for ever.
      start: what the first token goes on from, as returned for earlier tokens that ended with a segment; its
        anchor is not used. None: the initial weights, from which documents start in any case. Not with
        independent segments. There is no "tpu" for it.
      chunk_length: tokens whose gradients are taken at the same weights; divides segment_length.
      document_ids: [B, T] integers that do not decrease along a row: where they change, the memory starts
        anew from the initial weights. Documents must start at multiples of chunk_length within a segment.
      lengths: [B] integers, tokens of each row that are written; reads after them are finite but mean
        nothing. None: all.
      hidden_bias: [B, T, H, E], hidden units of other weights mixed in (MC eq. 14-15); None is 0.
      hidden_gate: [B, T, H], the share of this memory in that mixture; None is 1.
      implementation: "tpu", "xla" or "reference"; None picks the best for the platform of the mesh that is
        set (`jax.set_mesh`), or else of the default device. "tpu" is float32 and bfloat16, without
        hidden_bias and hidden_gate, for states that fit into VMEM, and not split over devices by itself:
        it belongs in a `jax.shard_map` over batch and heads.

    Returns:
      The branch at q_t without the skip q_t, [B, T, H, V] in q's dtype; the weights after each segment
      ([B, S, H, K, E], [B, S, H, E, V]); the state right after each row's last token, with which
      `deep_memory_step` goes on. With hidden_bias or hidden_gate there is a fourth, the hidden units
      gelu(hidden_gate q_t W_in,t + hidden_bias) [B, T, H, E] in q's dtype, and the first is a part of z,
      hidden_gate hidden W_out,t, whatever the branch: that of the mixture is the caller's to take.

    Raises:
      ValueError: if shapes, names or lengths do not fit, or the objective has no use for a coefficient.
    """
    check_objective(objective, momentum, previous_step)
    form = Branch(branch)
    if segment_init not in _SEGMENT_INITS:
        raise ValueError(f"segment_init is {segment_init!r}; choose one of {', '.join(_SEGMENT_INITS)}")
    if implementation not in (None, *_IMPLEMENTATIONS):
        names = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; choose one of {names}, or None for the best")
    if segment_length < 1 or chunk_length < 1 or segment_length % chunk_length:
        raise ValueError(
            f"chunk_length {chunk_length} does not divide segment_length {segment_length}; "
            "choose a positive chunk_length that does"
        )
    if not isinstance(initial_state, tuple):
        raise ValueError(
            "initial_state is not a pair; pass [heads, key_dim, hidden] and [heads, hidden, key_dim]"
        )
    _check_shapes(
        q,
        initial_state,
        {
            "k": (k, ("T", "H", "K")),
            "v": (v, ("T", "H", "K")),
            "retention": (retention, ("T", "H")),
            "momentum": (momentum, ("T", "H")),
            "step": (step, ("T", "H")),
            "document_ids": (document_ids, ("T",)),
            "lengths": (lengths, ()),
            "hidden_bias": (hidden_bias, ("T", "H", "E")),
            "hidden_gate": (hidden_gate, ("T", "H")),
        },
    )
    _check_start(start, q, initial_state, objective, segment_init)
    has_kernel = (
        start is None
        and hidden_bias is None
        and hidden_gate is None
        and tpu.has_kernel(q, initial_state[0].shape[-1], momentum=objective == "l2")
    )
    if implementation is None:
        implementation = "tpu" if on_tpu(q) and has_kernel else "xla"
    if implementation == "tpu" and not has_kernel:
        raise ValueError(
            "there is no kernel for TPUs of float64, start, hidden_bias, hidden_gate or states too large for "
            f"the chip's VMEM, here of {initial_state[0].shape}; leave implementation out, or choose 'xla'"
        )
    further = {} if implementation == "tpu" else {"start": start}
    read, states, final, hidden = _IMPLEMENTATIONS[implementation](
        q,
        k,
        v,
        objective=objective,
        branch=form,
        retention=retention,
        momentum=momentum,
        step=step,
        segment_length=segment_length,
        segment_init=segment_init,
        initial_state=initial_state,
        chunk_length=chunk_length,
        document_ids=document_ids,
        lengths=None if lengths is None else lengths.astype(jnp.int32),
        hidden_bias=hidden_bias,
        hidden_gate=hidden_gate,
        **further,
    )
    return (read, states, final) if hidden is None else (read, states, final, hidden)


def _check_start(start: OnlineState | None, q, initial_state, objective: str, segment_init: str) -> None:
    if start is None:
        return
    if segment_init == "independent":
        raise ValueError("independent segments go on from nothing; leave start out")
    batch, _, heads, _ = q.shape
    shapes = [(batch, heads, *leaf.shape[-2:]) for leaf in initial_state]
    momentum = start.momentum if objective == "l2" else start.weights
    for name, pair in (("weights", start.weights), ("momentum", momentum)):
        if not isinstance(pair, tuple) or [leaf.shape for leaf in pair] != shapes:
            raise ValueError(
                f"start's {name} is not a pair {shapes}; pass what a call with {objective!r} returned"
            )


def _check_shapes(q, initial_state, expected) -> None:
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {q.shape}; pass [batch, length, heads, key_dim] with length 1 or more")
    batch, tokens, heads, key_dim = q.shape
    hidden = initial_state[0].shape[-1]
    for name, x, shape in (
        ("initial_state's w_in", initial_state[0], (heads, key_dim, hidden)),
        ("initial_state's w_out", initial_state[1], (heads, hidden, key_dim)),
    ):
        if x.shape not in (shape, (batch, *shape)):
            raise ValueError(
                f"{name} has shape {x.shape}, but q {q.shape} needs {shape}, or a batch before it"
            )
    sizes = {"T": tokens, "H": heads, "K": key_dim, "E": hidden}
    for name, (x, axes) in expected.items():
        shape = (batch, *(sizes[axis] for axis in axes))
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}, but q {q.shape} and initial_state need {shape}")

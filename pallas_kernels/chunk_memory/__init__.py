"""The chunk recurrence of a matrix memory: writes, online reads and the state after every segment.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._platform import on_tpu, platform
from pallas_kernels._state import OnlineState
from pallas_kernels._step import memory_step
from pallas_kernels.chunk_memory import gpu, reference, tpu, xla

__all__ = ["chunk_memory", "memory_step"]

_IMPLEMENTATIONS = {
    "gpu": gpu.chunk_memory,
    "reference": reference.chunk_memory,
    "tpu": tpu.chunk_memory,
    "xla": xla.chunk_memory,
}
_RULES = ("linear", "swla", "delta", "titans")
_SEGMENT_INITS = ("checkpoint", "independent")


def chunk_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    segment_length: int,
    segment_init: str = "checkpoint",
    initial_state: jax.Array | None = None,
    start: OnlineState | None = None,
    chunk_length: int = 64,
    document_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """Write T tokens to a matrix memory per head, and read it after every token and every segment.

    With a retention, h step, p previous_step, m momentum:
      linear  M_t = a M_{t-1} + h k_t^T v_t (MC eq. 12)
      swla    M_t = a M_{t-1} + p k_{t-1}^T v_{t-1} + h k_t^T v_t (MC eq. 28)
      delta   M_t = a (M_{t-1} - h k_t^T k_t M_{t-1}) + h k_t^T v_t (Gated DeltaNet, arXiv:2412.06464)
      titans  S_t = m S_{t-1} + h k_t^T (v_t - k_t M_c), M_t = a M_{t-1} + S_t (Titans eq. 13-14, the
              loss halved), M_c being the memory at the start of the token's chunk
    States and coefficients are kept in float32 (float64 if q is).

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K]; for delta and titans of length 1 or so, or the recurrence may grow without bound.
      v: values [B, T, H, V].
      rule: "linear", "swla", "delta" or "titans".
      retention: a [B, T, H] in [0, 1]; None is 1.
      momentum: m [B, T, H] in [0, 1); None is 0. Only titans.
      step: h [B, T, H]; None is 1.
      previous_step: p [B, T, H]; None is 0. Only swla.
      segment_length: tokens of a segment; S = ceil(T / segment_length), the last one may be short.
      segment_init: "checkpoint", a segment goes on from the last one's state; "independent", every segment
        starts from the initial state, without momentum or a token before.
      initial_state: [H, K, V] or [B, H, K, V]; None is zero.
      start: what the first token goes on from, as returned for earlier tokens that ended with a segment; its
        anchor is not used. None: the initial state, from which documents start in any case. Not with
        independent segments. There is no "tpu" for it.
      chunk_length: tokens that are worked on together; divides segment_length. For titans also where
        gradients are taken, for the other rules without influence on the result.
      document_ids: [B, T] integers that do not decrease along a row: where they change, the memory starts
        anew from the initial state. For titans documents must start at multiples of chunk_length.
      lengths: [B] integers, tokens of each row that are written; reads after them are finite but mean
        nothing. None: all.
      implementation: "tpu" (titans in chunks of 128 tokens at most), "gpu" (XLA's products, many segments
        side by side; not titans), "xla" or "reference"; None picks the best for the platform of the mesh
        that is set (`jax.set_mesh`), or else of the default device; "gpu" was never measured. "tpu"
        is float32 and bfloat16, for linear and swla takes a retention below 2^-64 for that and gives it no
        gradient (which goes through the logarithm), and is not split over devices by itself: it belongs in a
        `jax.shard_map` over batch and heads.

    Returns:
      The reads q_t M_t [B, T, H, V] in q's dtype; the state after each segment [B, S, H, K, V]; and the state
      right after each row's last token, with which `memory_step` goes on.

    Raises:
      ValueError: if shapes, names or lengths do not fit, or the rule has no use for a coefficient.
    """
    if rule not in _RULES:
        raise ValueError(f"rule is {rule!r}; choose one of {', '.join(_RULES)}")
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
    for name, coefficient, owner in (
        ("momentum", momentum, "titans"),
        ("previous_step", previous_step, "swla"),
    ):
        if coefficient is not None and rule != owner:
            raise ValueError(f"{name} means nothing to rule {rule!r}; leave it out, or choose rule {owner!r}")
    _check_shapes(q, k, v, (retention, momentum, step, previous_step), initial_state, document_ids, lengths)
    _check_start(start, q, v, rule, segment_init)
    if implementation is None:
        kernel = (
            start is None
            and on_tpu(q)
            and tpu.has_kernel(q, v, rule=rule, segment_length=segment_length, chunk_length=chunk_length)
        )
        side_by_side = start is None and platform() == "gpu" and gpu.is_best(q, rule)
        implementation = "tpu" if kernel else "gpu" if side_by_side else "xla"
    takes_start = implementation in ("xla", "reference")
    if start is not None and not takes_start:
        raise ValueError(
            f"implementation {implementation!r} goes on from no start; leave it out, or choose 'xla'"
        )
    further = {"start": start} if takes_start else {}
    return _IMPLEMENTATIONS[implementation](
        q,
        k,
        v,
        rule=rule,
        retention=retention,
        momentum=momentum,
        step=step,
        previous_step=previous_step,
        segment_length=segment_length,
        segment_init=segment_init,
        initial_state=initial_state,
        chunk_length=chunk_length,
        document_ids=document_ids,
        lengths=None if lengths is None else lengths.astype(jnp.int32),
        **further,
    )


def _check_start(start: OnlineState | None, q, v, rule: str, segment_init: str) -> None:
    if start is None:
        return
    if segment_init == "independent":
        raise ValueError("independent segments go on from nothing; leave start out")
    batch, _, heads, key_dim = q.shape
    shape = (batch, heads, key_dim, v.shape[-1])
    momentum = start.momentum if rule == "titans" else start.weights
    for name, x in (("weights", start.weights), ("momentum", momentum)):
        if isinstance(x, tuple) or x is None or x.shape != shape:
            raise ValueError(
                f"start's {name} is not one array {shape}; pass what a call with {rule!r} returned"
            )
    if rule == "swla" and start.previous is None:
        raise ValueError("start has no previous token; pass what a call with 'swla' returned")


def _check_shapes(q, k, v, coefficients, initial_state, document_ids, lengths) -> None:
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q has shape {q.shape}; pass [batch, length, heads, key_dim] with length 1 or more")
    batch, tokens, heads, key_dim = q.shape
    if v.ndim != 4:
        raise ValueError(f"v has shape {v.shape}; pass [batch, length, heads, value_dim]")
    value_dim = v.shape[-1]
    names = ("retention", "momentum", "step", "previous_step")
    expected = [("k", k, [q.shape]), ("v", v, [(batch, tokens, heads, value_dim)])]
    expected += [(name, x, [(batch, tokens, heads)]) for name, x in zip(names, coefficients, strict=True)]
    expected += [
        ("initial_state", initial_state, [(heads, key_dim, value_dim), (batch, heads, key_dim, value_dim)]),
        ("document_ids", document_ids, [(batch, tokens)]),
        ("lengths", lengths, [(batch,)]),
    ]
    for name, x, shapes in expected:
        if isinstance(x, tuple):
            raise ValueError(f"{name} is a pair of MLP weights; pass one matrix, or use deep_memory")
        if x is not None and x.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {x.shape}, but q {q.shape} and v {v.shape} need {wanted}")

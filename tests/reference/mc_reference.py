"""Memory Caching written down token by token: the definition that the fast implementations are compared with.

Nothing here is fast, and nothing is shared with the code under test. One row of tokens and one head at a
time (`vmap` adds batch and heads): run the memory over the tokens and keep its state after every one of them;
then, for each token, list the cached memories it may read, score them, and read them together with its online
memory. Writing and reading are compiled apart, so that many settings share few compilations.

Shapes: B batch, T tokens, S segments, H heads, K key dim, V value dim, R router dim, E hidden, N memories
that a token may read. Weights are a matrix [K, V], or an MLP (w_in [K, E], w_out [E, V]).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

type Weights = Array | tuple[Array, Array]

tree_map = jax.tree.map


class Written(NamedTuple):
    """What is written: [B, T, H, ...]; of one row and head [T, ...]; or of one token [...]."""

    k: Array  # [..., K]
    v: Array  # [..., V]
    retention: Array  # a
    step: Array  # h
    momentum: Array  # m
    previous_step: Array  # p


class Asked(NamedTuple):
    """What reads: [B, T, H, ...]; of one row and head [T, ...]; or of one token [...]."""

    q: Array  # [..., K]
    u: Array  # [..., R]
    online_logit: Array | None


class Online(NamedTuple):
    """What the recurrence carries from token to token."""

    weights: Weights  # M
    momentum: Weights  # S
    anchor: Weights  # M at the start of the chunk: where gradients are taken
    previous_k: Array  # [K]
    previous_v: Array  # [V]


def memory_caching_reference(
    q: Array,
    k: Array,
    v: Array,
    u: Array,
    *,
    memory: Literal["linear", "swla", "delta", "dla", "titans"],
    aggregation: Literal["none", "residual", "gated", "soup", "sparse", "average", "null"],
    segment_length: int,
    segmentation: Literal["constant", "logarithmic"] = "constant",
    segment_init: Literal["checkpoint", "independent"] = "checkpoint",
    router_keys: Array | None = None,
    top_k: int | None = None,
    online_logit: Array | None = None,
    retention: Array | None = None,
    momentum: Array | None = None,
    step: Array | None = None,
    previous_step: Array | None = None,
    document_ids: Array | None = None,
    initial_state: Weights | None = None,
    chunk_length: int = 64,
    router_blocks: int = 1,
    branch: Literal["bounded", "plain"] | None = None,
) -> tuple[Array, Weights, Array]:
    """Read every token's query from its online and its cached memories.

    Args:
      q, k: [B, T, H, K]; v: [B, T, H, V]; u: [B, T, H, R].
      memory: how tokens are written.
      aggregation: how the online and the cached memories are read together.
      segment_length: tokens, counted from the row's start, after which the state is cached.
      segmentation: "constant", or "logarithmic": segments grouped by the binary digits of their number.
      segment_init: a segment goes on from the last one's state, or starts from `initial_state`.
      router_keys: [B, T, H, R], what is pooled; None: k.
      top_k: cached memories that "sparse" and "average" read; those of "null", or None: all.
      online_logit: [B, T, H], of "null" the null's; None: <u, running mean of its segment's router keys>.
      retention, momentum, step, previous_step: [B, T, H]; None: 1, 0, 1, 0.
      document_ids: [B, T] int, nondecreasing; None: a row is one document.
      initial_state: [H, K, V] or [B, H, K, V]; for an MLP the pair [.., H, K, E], [.., H, E, V]; None: zeros.
      chunk_length: tokens that take their gradients at one state (dla and titans).
      router_blocks: a segment's score is the largest score of this many equal parts of it.
      branch: of an MLP; None: "bounded".

    Returns:
      y [B, T, H, V], the states cached after each segment [B, S, H, ...], and the means of their router
      keys [B, S, H, R]; computed, and given back, in float32, or in float64 if q is.

    Raises:
      ValueError: for settings that are unknown or do not go together.
    """
    for name, value, known in (
        ("memory", memory, ("linear", "swla", "delta", "dla", "titans")),
        ("aggregation", aggregation, ("none", "residual", "gated", "soup", "sparse", "average", "null")),
        ("segmentation", segmentation, ("constant", "logarithmic")),
        ("segment_init", segment_init, ("checkpoint", "independent")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    if aggregation in ("sparse", "average") and top_k is None:
        raise ValueError(f"aggregation {aggregation!r} reads top_k cached memories; give top_k")
    if isinstance(initial_state, tuple) and memory not in ("dla", "titans"):
        raise ValueError(f"memory {memory!r} is a matrix; give one array as initial_state")
    if segmentation == "logarithmic" and segment_init == "independent" and memory not in ("linear", "swla"):
        raise ValueError(f"independent segments of memory {memory!r} do not merge; use linear or swla")
    if segment_length % router_blocks:
        raise ValueError(f"router_blocks {router_blocks} does not divide segment_length {segment_length}")

    batch, length, heads, key_dim = q.shape
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32

    def per_token(scalar: Array | None, default: float) -> Array:
        return jnp.full((batch, length, heads), default, dtype) if scalar is None else scalar.astype(dtype)

    written = Written(
        k=k.astype(dtype),
        v=v.astype(dtype),
        retention=per_token(retention, 1.0),
        step=per_token(step, 1.0),
        momentum=per_token(momentum, 0.0),
        previous_step=per_token(previous_step, 0.0),
    )
    if initial_state is None:
        initial_state = jnp.zeros((heads, key_dim, v.shape[-1]), dtype)
    initial = tree_map(
        lambda w: jnp.broadcast_to(w, (batch, heads, *w.shape[-2:])).astype(dtype), initial_state
    )
    document = jnp.zeros((batch, length), jnp.int32) if document_ids is None else document_ids
    position = jnp.arange(length)
    num_segments = -(-length // segment_length)
    last_token = jnp.minimum((jnp.arange(num_segments) + 1) * segment_length, length) - 1  # [S]

    # Write: the state after every token, [B, T, H, ...].
    starts_document = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))  # [B, T]
    starts_chunk = (position % segment_length) % chunk_length == 0  # [T]

    def run_memory(starts_afresh: Array) -> Weights:
        return _write_all(
            written, initial, starts_document | starts_afresh[None, :], starts_chunk, memory, branch
        )

    independent = segment_init == "independent"
    online_states = run_memory((position % segment_length == 0) & independent)
    cached_states = tree_map(lambda w: w[:, last_token], online_states)  # [B, S, H, ...]

    # The memory of the segments from `first` to `last`, for each two of them: [B, first, last, H, ...].
    if segmentation == "logarithmic" and independent:
        runs = [run_memory(position == segment * segment_length) for segment in range(num_segments)]
        group_states = tree_map(lambda *ws: jnp.stack([w[:, last_token] for w in ws], axis=1), *runs)
    else:  # a segment's own state, or, of several, the checkpoint at the end of the last
        group_states = tree_map(lambda w: jnp.stack([w] * num_segments, axis=1), cached_states)

    # Read.
    y, pooled = _read_all(
        Asked(q.astype(dtype), u.astype(dtype), None if online_logit is None else online_logit.astype(dtype)),
        (k if router_keys is None else router_keys).astype(dtype),
        online_states,
        group_states,
        document,
        0 if top_k is None else top_k,
        selects=top_k is not None,
        aggregation=aggregation,
        segmentation=segmentation,
        segment_length=segment_length,
        router_blocks=router_blocks,
        branch=branch,
    )
    return y, cached_states, pooled


# Writing (docs/math.md section 1)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _write_all(
    written: Written,
    initial: Weights,
    starts_afresh: Array,
    starts_chunk: Array,
    memory: str,
    branch: str | None,
) -> Weights:
    """States after each token [B, T, H, ...]; all is forgotten before those that `starts_afresh` [B, T]."""

    def write_row(written: Written, initial: Weights, starts_afresh: Array) -> Weights:
        beginning = Online(
            weights=initial,
            momentum=tree_map(jnp.zeros_like, initial),
            anchor=initial,
            previous_k=jnp.zeros_like(written.k[0]),
            previous_v=jnp.zeros_like(written.v[0]),
        )

        def write_next(online: Online, inputs: tuple[Written, Array, Array]) -> tuple[Online, Weights]:
            token, is_afresh, is_chunk_start = inputs
            online = tree_map(lambda new, old: jnp.where(is_afresh, new, old), beginning, online)
            if_start = functools.partial(jnp.where, is_chunk_start)
            online = online._replace(anchor=tree_map(if_start, online.weights, online.anchor))
            weights, momentum = _write(online, token, memory, branch)
            return Online(weights, momentum, online.anchor, token.k, token.v), weights

        return jax.lax.scan(write_next, beginning, (written, starts_afresh, starts_chunk))[1]

    heads = jax.vmap(write_row, in_axes=(1, 0, None), out_axes=1)
    return jax.vmap(heads)(written, initial, starts_afresh)


def _write(online: Online, token: Written, memory: str, branch: str | None) -> tuple[Weights, Weights]:
    """Write one token: M_t and S_t."""
    a, h, m, p = token.retention, token.step, token.momentum, token.previous_step
    k, v, weights = token.k, token.v, online.weights

    def dot_loss(weights: Weights) -> Array:
        return -jnp.dot(_read_memory(weights, k, branch), v)

    def l2_loss(weights: Weights) -> Array:
        return 0.5 * jnp.sum((_read_memory(weights, k, branch) - v) ** 2)

    if memory == "dla":
        gradient = jax.grad(dot_loss)(online.anchor)
        return tree_map(lambda w, g: a * w - h * g, weights, gradient), online.momentum
    if memory == "titans":
        gradient = jax.grad(l2_loss)(online.anchor)
        momentum = tree_map(lambda s, g: m * s - h * g, online.momentum, gradient)
        return tree_map(lambda w, s: a * w + s, weights, momentum), momentum

    assert not isinstance(weights, tuple)
    now, before = jnp.outer(k, v), jnp.outer(online.previous_k, online.previous_v)
    if memory == "linear":
        new = a * weights + h * now
    elif memory == "swla":
        new = a * weights + p * before + h * now
    else:
        new = a * (weights - h * jnp.outer(k, k @ weights)) + h * now
    return new, online.momentum


# Reading (docs/math.md sections 2 and 3)


@functools.partial(
    jax.jit,
    static_argnames=("aggregation", "segmentation", "segment_length", "router_blocks", "branch", "selects"),
)
def _read_all(
    asked: Asked,
    router_key: Array,
    online_states: Weights,
    group_states: Weights,
    document: Array,
    top_k: int,
    **settings: Any,
) -> tuple[Array, Array]:
    """Outputs [B, T, H, V] and pooled router keys [B, S, H, R]; `router_key` [B, T, H, R]."""
    heads = jax.vmap(
        functools.partial(_read_row, **settings), in_axes=(1, 1, 1, 2, None, None), out_axes=(1, 1)
    )
    rows = jax.vmap(heads, in_axes=(0, 0, 0, 0, 0, None))
    return rows(asked, router_key, online_states, group_states, document, top_k)


def _read_row(
    asked: Asked,
    router_key: Array,
    online_states: Weights,
    group_states: Weights,
    document: Array,
    top_k: int | Array,
    *,
    aggregation: str,
    segmentation: str,
    segment_length: int,
    router_blocks: int,
    branch: str | None,
    selects: bool,
) -> tuple[Array, Array]:
    """One row and head: y [T, V], pooled router keys [S, R]."""
    length = document.shape[0]
    num_segments = -(-length // segment_length)
    position = jnp.arange(length)
    segments = jnp.arange(num_segments)
    segment = position // segment_length  # [T], the segment of each token
    last_token = jnp.minimum((segments + 1) * segment_length, length) - 1  # [S]
    # A cached state and pooled key belong to the last document in their segment.
    cached_document = document[last_token]  # [S]

    def pooled_blocks(first: Array, last: Array, blocks: int) -> tuple[Array, Array]:
        """Means of router keys [blocks, R], and whether a block has any tokens to average [blocks]."""
        block_length = (last - first + 1) * (segment_length // blocks)
        block = (position - first * segment_length) // block_length
        belongs = (segment >= first) & (segment <= last) & (document == cached_document[last])
        in_block = belongs[None, :] & (block[None, :] == jnp.arange(blocks)[:, None])  # [blocks, T]
        return _masked_mean(router_key, in_block), in_block.any(axis=1)

    def memories_to_read(t: Array) -> tuple[Array, Array, Array]:
        """First and last segment of token t's cached memories, oldest first, and which exist: 3 x [N]."""
        eligible = (segments < segment[t]) & (cached_document == document[t])
        if segmentation == "constant":
            return segments, segments, eligible
        # n = 6 = 110b: four segments from the oldest, then two. A group of 2^digit segments comes after those
        # of the larger digits. Groups that do not exist are clipped into the row, and masked later.
        n = eligible.sum()
        oldest = segment[t] - n
        digit = jnp.arange(num_segments.bit_length())[::-1]
        first = oldest + ((n >> (digit + 1)) << (digit + 1))
        last = first + (1 << digit) - 1
        exists = (n >> digit) & 1 == 1
        return jnp.minimum(first, num_segments - 1), jnp.minimum(last, num_segments - 1), exists

    def gates_of(t: Array, first: Array, last: Array, exists: Array) -> tuple[Array, Array]:
        """Gates of the cached memories [N] and of the online one, or of the null, []."""
        if aggregation == "average":
            kept = exists & (_number_newer(exists) < top_k)
            online_gate = 1 / (1 + kept.sum()).astype(router_key.dtype)
            return jnp.where(kept, online_gate, 0), online_gate

        means, filled = jax.vmap(pooled_blocks, in_axes=(0, 0, None))(first, last, router_blocks)
        scores = jnp.where(filled, means @ asked.u[t], -jnp.inf).max(axis=1)  # [N]
        kept = exists
        if aggregation == "sparse" or (aggregation == "null" and selects):
            kept = exists & (_rank(scores, exists) < top_k)
        if asked.online_logit is None:
            so_far = (segment == segment[t]) & (document == document[t]) & (position <= t)
            online_logit = _masked_mean(router_key, so_far[None, :])[0] @ asked.u[t]
        else:
            online_logit = asked.online_logit[t]
        gates = jax.nn.softmax(jnp.append(jnp.where(kept, scores, -jnp.inf), online_logit))
        return gates[:-1], gates[-1]

    def read(t: Array) -> Array:
        """Token t's output [V]."""
        q = asked.q[t]
        online = tree_map(lambda w: w[t], online_states)
        if aggregation == "none":
            return _read_memory(online, q, branch)

        first, last, exists = memories_to_read(t)
        cached = tree_map(lambda w: w[first, last], group_states)  # [N, ...]
        if aggregation == "residual":
            branches = jax.vmap(lambda w: _branch(w, q, branch))(cached)  # [N, V]
            return _read_memory(online, q, branch) + jnp.where(exists[:, None], branches, 0).sum(axis=0)

        gates, online_gate = gates_of(t, first, last, exists)
        if aggregation == "soup":
            mixed = tree_map(lambda ws, w: jnp.tensordot(gates, ws, axes=1) + online_gate * w, cached, online)
            return _read_memory(mixed, q, branch)
        if aggregation == "null":
            branches = jax.vmap(lambda w: _branch(w, q, branch))(cached)  # [N, V]
            return _read_memory(online, q, branch) + gates @ branches
        outputs = jax.vmap(lambda w: _read_memory(w, q, branch))(cached)  # [N, V]
        return gates @ outputs + online_gate * _read_memory(online, q, branch)

    y = jax.vmap(read)(position)
    pooled = jax.vmap(lambda s: pooled_blocks(s, s, 1)[0][0])(segments)
    return y, pooled


def _branch(weights: Weights, x: Array, branch: str | None) -> Array:
    """x [K] -> [V]: the memory without the skip term that an MLP has."""
    if isinstance(weights, tuple):
        w_in, w_out = weights
        z = jax.nn.gelu(x @ w_in, approximate=True) @ w_out
        return z if branch == "plain" else z / jnp.sqrt(1 + jnp.mean(z**2))
    return x @ weights


def _read_memory(weights: Weights, x: Array, branch: str | None) -> Array:
    """M(x), x [K] -> [V]."""
    read = _branch(weights, x, branch)
    return x + read if isinstance(weights, tuple) else read


def _masked_mean(rows: Array, mask: Array) -> Array:
    """Means of the `rows` [T, R] that each line of `mask` [M, T] picks: [M, R]; zeros where it picks none."""
    count = jnp.maximum(mask.sum(axis=1), 1).astype(rows.dtype)
    return mask.astype(rows.dtype) @ rows / count[:, None]


def _rank(scores: Array, exists: Array) -> Array:
    """Number of memories that come before each one [N]: better scored, or as well scored and older."""
    other, own, index = scores[None, :], scores[:, None], jnp.arange(scores.shape[0])
    older = index[None, :] < index[:, None]
    return (exists[None, :] & ((other > own) | ((other == own) & older))).sum(axis=1)


def _number_newer(exists: Array) -> Array:
    """Number of memories that are newer than each one [N]."""
    return exists.sum() - exists.cumsum()

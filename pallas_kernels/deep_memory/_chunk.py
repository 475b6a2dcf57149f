"""A run of chunks of the MLP memory: matrix products inside a chunk, and never the weights of a token.

All gradients of a chunk are taken at the weights it starts from, so its writes are sums of outer products,
and reading the weights of token t is a read of the chunk's start plus a causal, decayed attention over the
chunk's writes, layer by layer (the dual form of TTT and Titans).

Shapes: N chunks, R rows, C chunk, H heads, K key dim, V value dim, E hidden dim.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels._branch import Branch
from pallas_kernels._decay import decay_matrix
from pallas_kernels._state import OnlineState, select_rows
from pallas_kernels.deep_memory._products import apply, apply_transposed, decayed_apply, decayed_outer

# Of a chunk only these are kept for its gradient, with the state it starts from; what lies between them is
# elementwise and made again.
_KEPT = ("key_hidden", "key_output", "hidden_signal", "query_hidden", "hidden_scores", "query_output")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What is worked on, chunks first: [N, R, H, C, dim] and [N, R, H, C]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    retention: jax.Array
    """1 where nothing is written."""
    momentum: jax.Array
    """1 where nothing is written; without meaning for the objective "dot"."""
    step: jax.Array
    """0 where nothing is written."""
    live: jax.Array | None
    """1 where a token is written and 0 where not, [N, R, 1, C]; None: all are."""
    restart: jax.Array | None
    """Chunks that begin a document [N, R] bool; None: none does."""
    hidden_bias: jax.Array | None
    """[N, R, H, C, E]."""
    hidden_gate: jax.Array | None
    """[N, R, H, C]."""


class Shares(NamedTuple):
    """How much of the chunk's start (weights, then momentum) and of each write is in a state."""

    read: tuple[jax.Array, ...]
    """[..., C]: of the start's weights, and momentum, in each token's weights."""
    between: jax.Array
    """[..., C, C]: of the write of token j in the weights of token i."""
    written: tuple[jax.Array, ...]
    """[..., C]: of each write in the end's weights, and momentum."""
    carried: jax.Array | None
    """[...]: of the start's momentum in the end's; None without momentum."""


def decay_shares(tokens: Tokens, with_momentum: bool) -> Shares:
    """Return the shares that retention and momentum leave (docs/math.md section 1): G = B E, b, f, and ends.

    B holds the products of retentions between two tokens, E those of momenta.
    """
    factors = (tokens.retention, tokens.momentum) if with_momentum else (tokens.retention,)
    between, since = _decays(jnp.stack(factors))
    if not with_momentum:
        return Shares((since[0],), between[0], (between[0, ..., -1, :],), None)
    (kept, pushed), (kept_since, pushed_since) = between, since
    # Where nothing is written the momentum stays, and does not move the weights.
    moved = kept if tokens.live is None else kept * tokens.live[..., None, :]
    between = jnp.matmul(moved, pushed, precision="highest")
    moved_since = jnp.matmul(moved, pushed_since[..., None], precision="highest")[..., 0]
    return Shares(
        (kept_since, moved_since),
        between,
        (between[..., -1, :], pushed[..., -1, :]),
        pushed_since[..., -1],
    )


def _decays(factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the products of factors [..., C] between two tokens [..., C, C], and from the chunk's start."""
    between = decay_matrix(factors)
    return between, between[..., 0] * factors[..., :1]


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return gelu(x), by its tanh approximation, and its derivative."""
    cubic, scale = 0.044715, math.sqrt(2 / math.pi)
    square = x * x
    tanh = jnp.tanh(scale * x * (1 + cubic * square))
    gelu = 0.5 * x * (1 + tanh)
    return gelu, 0.5 * (1 + tanh) + 0.5 * scale * x * (1 - tanh * tanh) * (1 + 3 * cubic * square)


def run_chunks(
    state: OnlineState, tokens: Tokens, *, objective: str, branch: Branch, initial: OnlineState
) -> tuple[OnlineState, tuple[jax.Array, jax.Array | None]]:
    """Return the state after the chunks, and for each their reads [N, R, H, C, V] and gated hidden units.

    Args:
      state: the state before. Its anchor is None where all tokens are live.
      tokens: the chunks.
      objective: "dot" or "l2".
      branch: "bounded" or "plain".
      initial: what documents start from, like `state`.
    """
    shares = decay_shares(tokens, with_momentum=objective == "l2")
    scores = apply_transposed(tokens.q, tokens.k) * shares.between
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT)
    chunk = functools.partial(_chunk, objective=objective, branch=branch, initial=initial)
    # CSE is prevented though this is a loop's body: of one chunk it is no loop, and CSE would keep all.
    return jax.lax.scan(jax.checkpoint(chunk, policy=policy), state, (tokens, shares, scores))


def _chunk(
    state: OnlineState,
    inputs: tuple[Tokens, Shares, jax.Array],
    *,
    objective: str,
    branch: Branch,
    initial: OnlineState,
) -> tuple[OnlineState, tuple[jax.Array, jax.Array | None]]:
    tokens, shares, scores = inputs
    if tokens.restart is not None:
        state = select_rows(tokens.restart, initial, state)
    w_in, w_out = state.weights
    in_rows, out_rows = _rows(state)
    dtype = w_in.dtype
    k, v = tokens.k.astype(dtype), tokens.v.astype(dtype)

    # Writes: minus the gradients, W_in by k^T hidden_signal and W_out by key_gelu^T signal.
    key_hidden = checkpoint_name(apply(k, w_in), "key_hidden")
    key_gelu, slope = gelu_and_slope(key_hidden)
    error, output = v, jnp.zeros_like(v)
    if objective == "l2" or branch.is_bounded:
        output = checkpoint_name(apply(key_gelu, w_out), "key_output")
    if objective == "l2":
        error = v - k - branch.of(output)
    signal = tokens.step[..., None] * branch.bar(output, error)
    hidden_signal = checkpoint_name(apply_transposed(signal, w_out), "hidden_signal") * slope

    # Reads of every token's own weights.
    low = tokens.q.dtype
    hidden = decayed_apply(tokens.q, shares.read, in_rows) + apply(scores.astype(low), hidden_signal)
    hidden = checkpoint_name(hidden, "query_hidden")
    if tokens.hidden_gate is not None:
        hidden = tokens.hidden_gate[..., None] * hidden
    if tokens.hidden_bias is not None:
        hidden = hidden + tokens.hidden_bias.astype(dtype)
    gelu = jax.nn.gelu(hidden, approximate=True).astype(low)
    hidden_scores = checkpoint_name(apply_transposed(gelu, key_gelu), "hidden_scores") * shares.between
    read = decayed_apply(gelu, shares.read, out_rows) + apply(hidden_scores.astype(low), signal)
    soup = tokens.hidden_gate is not None or tokens.hidden_bias is not None
    if tokens.hidden_gate is not None:
        read = tokens.hidden_gate[..., None] * read
    if not soup:
        read = branch.of(checkpoint_name(read, "query_output"))

    in_rows = _advance(in_rows, decayed_outer(k, hidden_signal, shares.written), shares)
    out_rows = _advance(out_rows, decayed_outer(key_gelu, signal, shares.written), shares)
    anchor = state.anchor
    if anchor is not None:
        assert tokens.live is not None
        anchor = select_rows(tokens.live[:, 0, 0] > 0, state.weights, anchor)
    after = OnlineState(
        weights=(in_rows[0], out_rows[0]),
        momentum=None if state.momentum is None else (in_rows[1], out_rows[1]),
        anchor=anchor,
    )
    return after, (read.astype(low), gelu if soup else None)


def _rows(state: OnlineState) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return (weights, momentum) of W_in and of W_out, or just (weights,)."""
    trees = (state.weights,) if state.momentum is None else (state.weights, state.momentum)
    return tuple(tree[0] for tree in trees), tuple(tree[1] for tree in trees)


def _advance(
    rows: tuple[jax.Array, ...], written: tuple[jax.Array, ...], shares: Shares
) -> tuple[jax.Array, ...]:
    """Return a layer's (weights, momentum) at the chunk's end from those at its start and what is written."""
    ends = [share[..., -1][..., None, None] for share in shares.read]
    moved = [end * row for end, row in zip(ends, rows, strict=True)]
    weights = sum(moved[1:], moved[0]) + written[0]
    if shares.carried is None:
        return (weights,)
    return weights, shares.carried[..., None, None] * rows[1] + written[1]

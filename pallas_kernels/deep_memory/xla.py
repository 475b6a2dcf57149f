"""The MLP memory in chunks: inside a chunk there are only matrix products, and no weights of a single token.

With the gradients of a chunk all taken at the weights it starts from, every write is a sum of outer products,
so reading the weights of token t is a read of the chunk's start plus a causal, decayed attention over the
chunk's writes, layer by layer (the dual form of TTT and Titans). Weights M and momentum S travel together as a
state with R rows (M, S), because (M, S) decays by a 2 x 2 matrix; without momentum R is 1.

Shapes: B batch, T tokens, S segments, C chunk, H heads, K key dim, V value dim, E hidden dim, R state rows.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState, batch_weights, select_rows, state_dtype

_BLOCK_CHUNKS = 8
_HIGHEST = jax.lax.Precision.HIGHEST


class Tokens(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    retention: jax.Array
    momentum: jax.Array | None
    step: jax.Array
    hidden_bias: jax.Array | None
    hidden_gate: jax.Array | None


def _matmul(a, b, **kw):
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32), **kw)


def gelu_and_slope(z):
    cubic, scale = 0.044715, (2 / jnp.pi) ** 0.5
    square = z * z
    t = jnp.tanh(scale * z * (1 + cubic * square))
    gelu = 0.5 * z * (1 + t)
    slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * cubic * square)
    return gelu, slope


def decay_products(x):
    """[..., C] -> [..., C, C + 1]"""
    C = x.shape[-1]
    rows, columns = jnp.arange(1, C + 1)[:, None], jnp.arange(C + 1)[None, :]
    factor = jnp.where((rows > columns), x[..., :, None], jnp.ones((), x.dtype))
    return jnp.where(rows >= columns, jnp.cumprod(factor, axis=-2), 0)


def block(objective, carry, tokens):
    dtype = carry[0].dtype
    t = tokens
    B = decay_products(t.retention)
    if t.momentum is not None:
        Em = decay_products(t.momentum)
        G = _matmul(B[..., 1:], Em, precision=_HIGHEST)
        read = jnp.stack([B[..., 0], G[..., 0]], -2)   # [g,B,H,R,C]
        write = jnp.stack([G[..., -1, 1:], Em[..., -1, 1:]], -2)
        G = G[..., 1:]
        trans = (B[..., -1, 0], read[..., 1, -1], Em[..., -1, 0])
    else:
        G = B[..., 1:]
        read = B[..., None, :, 0]
        write = G[..., None, -1, :]
        trans = (B[..., -1, 0],)
    attn = _matmul(t.q, t.k.swapaxes(-1, -2)) * G

    def chunk(carry, xs):
        X1, X2 = carry
        t, G, read, write, trans, P1 = xs
        k = t.k.astype(dtype)
        W1, W2 = X1[..., 0, :, :], X2[..., 0, :, :]
        z = _matmul(k, W1, precision=_HIGHEST)
        h, slope = gelu_and_slope(z)
        v = t.v.astype(dtype)
        if objective == "l2":
            v = v - k - _matmul(h, W2, precision=_HIGHEST)
        U2 = t.step[..., None] * v
        U1 = _matmul(U2, W2.swapaxes(-1, -2), precision=_HIGHEST) * slope
        # read
        zq = readw(t.q, read, X1) + _matmul(P1.astype(t.q.dtype), U1.astype(t.q.dtype))
        hq, _ = gelu_and_slope(zq)
        hq = hq.astype(t.q.dtype)
        P2 = _matmul(hq, h.astype(t.q.dtype).swapaxes(-1, -2)) * G
        o = readw(hq, read, X2) + _matmul(P2.astype(t.q.dtype), U2.astype(t.q.dtype))
        X1 = writew(X1, k, U1, write, trans)
        X2 = writew(X2, h, U2, write, trans)
        return (X1, X2), o.astype(t.q.dtype)

    return jax.lax.scan(chunk, carry, (tokens, G, read, write, trans, attn))


def readw(q, read, X):
    *_, R, K, E = X.shape
    q = (q[..., None, :] * read.swapaxes(-1, -2)[..., None].astype(q.dtype))
    q = q.reshape(*q.shape[:-2], R * K)
    return _matmul(q, X.reshape(*X.shape[:-3], R * K, E).astype(q.dtype))


def writew(X, k, U, write, trans):
    *_, R, K, E = X.shape
    k = (k[..., None, :] * write.swapaxes(-1, -2)[..., None])
    k = k.reshape(*k.shape[:-2], R * K)
    D = _matmul(k.swapaxes(-1, -2), U, precision=_HIGHEST).reshape(X.shape)
    if R == 1:
        return trans[0][..., None, None, None] * X + D
    b, f, m = (x[..., None, None] for x in trans)
    W, S = X[..., 0, :, :], X[..., 1, :, :]
    return jnp.stack([b * W + f * S, m * S], -3) + D

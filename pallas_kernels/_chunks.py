"""Tokens laid out in chunks, with every mask already in their coefficients.

B batch, S segments, N chunks of a segment, C chunk, H heads, K key dim, V value dim. R rows: the batch, or
batch times segments where segments are independent and so run side by side.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._state import state_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What one segment works on, [R, N, H, C, dim] and [R, N, H or 1, C]; None is the neutral coefficient."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: jax.Array | None
    """Retention; 1 where nothing is written, 0 where a document starts (but not for titans)."""
    restart: jax.Array | None
    """How much of the initial state enters with the token: the retention where a document starts, else 0."""
    write: jax.Array | None
    """Step; 0 where nothing is written."""
    previous_write: jax.Array | None
    """Step of the token before: swla; 0 where there is none."""
    momentum: jax.Array | None
    """Momentum: titans; 1 where nothing is written."""
    live: jax.Array | None
    """1 where a token is written and 0 where not, [R, N, 1, C] in the state's dtype: titans."""
    document_start: jax.Array | None
    """[R, N, 1, C] bool, tokens that begin a document: titans, which looks at each chunk's first."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How T tokens are cut: S segments of N chunks of C tokens, padded at the end."""

    segments: int
    chunks: int
    chunk: int

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        return self.chunks * self.chunk

    @property
    def tokens(self) -> int:
        """Tokens in all, padding included."""
        return self.segments * self.segment

    @classmethod
    def fit(cls, tokens: int, segment_length: int, chunk_length: int) -> "Grid":
        """Return the smallest grid that holds `tokens`."""
        chunk = min(chunk_length, tokens)
        if tokens <= segment_length:
            return cls(segments=1, chunks=-(-tokens // chunk), chunk=chunk)
        return cls(segments=-(-tokens // segment_length), chunks=segment_length // chunk, chunk=chunk)

    def pad(self, x: jax.Array) -> jax.Array:
        """Repeat the last token of [B, T, ...] up to the grid's end."""
        more = self.tokens - x.shape[1]
        if more == 0:
            return x
        # Of `jnp.pad` with mode "edge" the gradient would add zeros along every axis.
        return jnp.concatenate([x, jnp.repeat(x[:, -1:], more, axis=1)], axis=1)

    def cut(self, x: jax.Array, independent: bool) -> jax.Array:
        """Turn [B, S*N*C, ...] into [S, B, N, C, ...], or [1, B*S, N, C, ...] if `independent`."""
        batch, _, *rest = x.shape
        if independent:
            return x.reshape(1, batch * self.segments, self.chunks, self.chunk, *rest)
        return jnp.moveaxis(x.reshape(batch, self.segments, self.chunks, self.chunk, *rest), 1, 0)

    def join(self, x: jax.Array, independent: bool) -> jax.Array:
        """Undo `cut`."""
        if not independent:
            x = jnp.moveaxis(x, 0, 1)
        return x.reshape(-1, self.tokens, *x.shape[4:])


def heads_first(x: jax.Array) -> jax.Array:
    """Swap the axes of chunk and heads: [R, N, C, H, ...] to [R, N, H, C, ...] and back."""
    return jnp.swapaxes(x, 2, 3)


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Return x [..., C, dim] times factor [..., C], in the factor's dtype; x itself if there is none."""
    return x if factor is None else x.astype(factor.dtype) * factor[..., None]


def product(equation: str, left: jax.Array, right: jax.Array, like: jax.Array) -> jax.Array:
    """Return a product of two matrices rounded to the dtype of `like`, accumulated in the state's dtype."""
    left, right = left.astype(like.dtype), right.astype(like.dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=state_dtype(like))

"""The dense read of matrices as a kernel for NVIDIA's Hopper GPUs (Mosaic GPU), in `_gpu_matrix`.

Its gradient is XLA's. The kernel is compiled for an H100 and interpreted in tests, but no GPU has run it: its
speed is unmeasured, so that `implementation=None` is XLA on GPUs until someone measures both. It is for
Hopper alone, whose tensor-core instructions (wgmma) neither older nor newer GPUs have.

Off a GPU it runs in interpret mode alone, under `plgpu.force_gpu_interpret_mode()`. It is not split over
devices by itself: run it in a `jax.shard_map` over batch and heads.

T tokens, K key dim, V value dim, N states.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._platform import has_wgmma, platform
from pallas_kernels._state import Weights
from pallas_kernels.state_read import xla
from pallas_kernels.state_read._gpu_matrix import DIMS, MOST_KEY_DIM, TOKENS, read


def has_kernel(q: jax.Array, states: Weights) -> bool:
    """Whether the device has a kernel for queries [B, T, H, K] and these states."""
    return _obstacle(q, states) is None


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, branch: Branch | None, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    del branch  # matrices have none
    if obstacle := _obstacle(q, states):
        raise ValueError(f"there is no kernel for GPUs {obstacle}; leave implementation out, or choose 'xla'")
    if q.size == 0 or gates.size == 0:
        return jnp.zeros((*q.shape[:-1], jax.tree.leaves(states)[-1].shape[-1]), q.dtype)
    return _read(q, gates.astype(jnp.float32), states, segment_length)


def _obstacle(q: jax.Array, states: Weights) -> str | None:
    """Why the kernel cannot read these states; None if it can."""
    if isinstance(states, tuple):
        return "that reads MLPs"
    if q.dtype != jnp.bfloat16:
        return f"with queries of {q.dtype}, but of bfloat16"
    if q.shape[-1] > MOST_KEY_DIM:
        return f"with a key_dim of {q.shape[-1]}, but of {MOST_KEY_DIM} at most"
    if platform() != "cpu" and not has_wgmma():
        return "but Hopper's"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _read(q, gates, states, segment_length):
    length, value_dim = q.shape[1], states.shape[4]
    more_tokens, more_keys, more_values = -length % TOKENS, -q.shape[3] % DIMS, -value_dim % DIMS
    padded_q = jnp.pad(q, ((0, 0), (0, more_tokens), (0, 0), (0, more_keys)))
    gates_BHNT = jnp.pad(gates.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, more_tokens)))
    states = jnp.pad(states.astype(q.dtype), ((0, 0), (0, 0), (0, 0), (0, more_keys), (0, more_values)))
    return read(padded_q, gates_BHNT, states, length, segment_length)[:, :length, :, :value_dim]


def _forward(q, gates, states, segment_length):
    return _read(q, gates, states, segment_length), (q, gates, states)


def _backward(segment_length, residuals, out_bar):
    # The read itself is not made again: XLA drops what nobody uses.
    read = functools.partial(xla.gated_state_read, branch=None, segment_length=segment_length)
    _, vjp = jax.vjp(read, *residuals)
    return vjp(out_bar)


_read.defvjp(_forward, _backward)

"""The MLP memory as Pallas kernels for TPUs: `_tpu_forward` and `_tpu_backward`.

Products of writes have operands in q's dtype too, where the other forms compute them in float32. What is kept
for the gradient is the state that every block of chunks starts from, in q's dtype. Under `jax.checkpoint` the
kernel runs again: keeping its states between layers would take longer.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._chunks import Grid
from pallas_kernels._platform import vmem_bytes
from pallas_kernels._state import OnlineState, batch_weights, select_rows, state_dtype
from pallas_kernels.deep_memory import _tpu_backward, _tpu_forward
from pallas_kernels.deep_memory._layout import lay_out
from pallas_kernels.deep_memory._tpu_layout import Cut


def has_kernel(q: jax.Array, hidden: int, *, momentum: bool) -> bool:
    """Whether states of keys as of queries [B, T, H, K] and so many hidden units fit into the chip's VMEM.

    No TPU has float64.
    """
    if q.dtype == jnp.float64:
        return False
    available = vmem_bytes()
    cut = Cut.fit(
        Grid.fit(1, 1, 1),
        q,
        hidden,
        branch=Branch("bounded"),
        momentum=momentum,
        documents=False,
        anchored=False,
    )
    return available is None or cut.vmem_bytes <= available


def deep_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    objective: str,
    branch: Branch,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    segment_length: int,
    segment_init: str,
    initial_state: tuple[jax.Array, jax.Array],
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
    hidden_bias: jax.Array | None,
    hidden_gate: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], OnlineState, jax.Array | None]:
    """See `pallas_kernels.deep_memory`, which checks the arguments."""
    assert hidden_bias is None
    assert hidden_gate is None
    batch, count, _, dim = q.shape
    hidden = initial_state[0].shape[-1]
    independent = segment_init == "independent"
    grid = Grid.fit(count, segment_length, chunk_length)
    tokens = lay_out(
        grid,
        q,
        k,
        v,
        coefficients=(retention, momentum, step),
        document_ids=document_ids,
        lengths=lengths,
        hidden_bias=None,
        hidden_gate=None,
    )
    cut = Cut.fit(
        grid,
        q,
        hidden,
        branch=branch,
        momentum=objective == "l2",
        documents=document_ids is not None,
        anchored=lengths is not None or count % chunk_length != 0,
    )

    restarts = jnp.arange(grid.segments * grid.chunks, dtype=jnp.int32)
    restarts = (restarts % grid.chunks if independent else restarts) == 0
    restarts = jnp.broadcast_to(restarts[None], (batch, restarts.size))
    if tokens.restart is not None:
        restarts = restarts | tokens.restart[:, :: grid.chunk, 0]
    ends = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
    last = jnp.maximum(ends - 1, 0)
    last_block = jnp.full_like(last, cut.blocks - 1)
    if independent:
        last_block = (last // grid.segment + 1) * cut.blocks_of_segment - 1

    read, states, final, anchor = _run(
        cut,
        tuple(cut.rows_of(x, grid) for x in (tokens.q, tokens.k, tokens.v)),
        cut.coefficients_of(tokens, grid),
        cut.weights_of(batch_weights(initial_state, batch, state_dtype(q))),
        restarts.astype(jnp.int32),
        jnp.stack([last_block, last // grid.chunk], axis=1),
    )

    def crop(w_in, w_out):
        return w_in[..., :dim, :hidden], w_out[..., :hidden, :dim]

    def crop_transposed(w_in, w_out):
        return crop(w_in, w_out.swapaxes(-1, -2))

    weights, *surprise = (crop_transposed(*pair) for pair in zip(*final, strict=True))
    if anchor is None:
        anchor = weights
    else:
        anchor = select_rows(ends % chunk_length == 0, weights, crop_transposed(*anchor))
    final = OnlineState(weights=weights, momentum=surprise[0] if surprise else None, anchor=anchor)
    return cut.from_rows(read, grid, dim)[:, :count], crop(*states), final, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(cut, tokens, coefficients, initial, restarts, ends):
    return _tpu_forward.run(cut, tokens, coefficients, initial, restarts, ends, keep=False)[:4]


def _forward(cut, tokens, coefficients, initial, restarts, ends):
    read, states, *final, kept = _tpu_forward.run(
        cut, tokens, coefficients, initial, restarts, ends, keep=True
    )
    return (read, states, *final), (tokens, coefficients, initial, restarts, ends, kept)


def _backward(cut, residuals, bars):
    return *_tpu_backward.run_bar(cut, *residuals, *bars), None, None


_run.defvjp(_forward, _backward)

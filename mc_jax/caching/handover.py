"""A memory run over rows that devices share: each run of segments goes on from the state before it.

A memory that is affine in its start is run on all devices at once, from the initial state; then the states
at the runs' ends cross devices, and what the right start changes is added. Any other one is run device after
device, once, to find the states that the runs start from, and then on all devices at once.

Shapes: B batch, T tokens of a device, S segments of a device, N devices, H heads, K key dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.caching.cache import restart
from mc_jax.caching.neighbours import Neighbours
from mc_jax.memories import AffineMemory, Coefficients, Layout, Memory, MemoryRun, Response
from pallas_kernels._finite import not_finite, spoilt, zeroed
from pallas_kernels._state import OnlineState, batch_weights, select_rows


def run_in_order(
    memory: Memory,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    coefficients: Coefficients,
    layout: Layout,
    goes_on: jax.Array,
    neighbours: Neighbours,
) -> tuple[MemoryRun, Layout]:
    """Run the memory over this device's tokens [B, T, ...] as a part of whole rows.

    Args:
      memory: which.
      q: queries.
      k: keys.
      v: values.
      coefficients: of the tokens.
      layout: of the rows; segments are checkpoints.
      goes_on: tokens that are of the document of the token before the first [B, T], bool.
      neighbours: the devices that share the rows.

    Returns:
      The run, and the layout with which the same tokens may be run again on all devices at once.
    """
    if isinstance(memory, AffineMemory):
        previous = neighbours.from_before((k[:, -1], v[:, -1]))
        run, response = memory.run_with_response(q, k, v, coefficients, layout, goes_on, previous)
        return _started_elsewhere(run, response, _change(run, response, layout, neighbours)), layout

    def final(start: OnlineState | None) -> OnlineState:
        return memory.run(q, k, v, coefficients, dataclasses.replace(layout, start=start)).final

    like = jax.eval_shape(lambda: final(None))
    initial = restart(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), layout.initial_state)
    start = _start_in_turn(final, initial, goes_on[:, 0], neighbours)
    layout = dataclasses.replace(layout, start=start)
    return memory.run(q, k, v, coefficients, layout), layout


def _change(run: MemoryRun, response: Response, layout: Layout, neighbours: Neighbours) -> jax.Array:
    """The state that this device starts from, less the initial one [B, H, K, V]."""
    assert isinstance(run.segment_states, jax.Array)
    end = run.segment_states[:, -1]
    if layout.initial_state is not None:
        initial = batch_weights(layout.initial_state, end.shape[0], end.dtype)
        assert isinstance(initial, jax.Array)
        end = end - initial
    ends, shares = neighbours.collect((end, response.states[:, -1]))

    def after(change: jax.Array, device: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        end, share = device
        return end + _times(share, change), change

    _, changes = jax.lax.scan(after, jnp.zeros_like(end), (ends, shares))
    return changes[neighbours.index]


def _started_elsewhere(run: MemoryRun, response: Response, change: jax.Array) -> MemoryRun:
    """The run, had it started from a state that differs by `change` [B, H, K, V]."""
    assert isinstance(run.segment_states, jax.Array)
    states = run.segment_states + _times(response.states, change[:, None])
    bad = not_finite(change, axes=2)
    reads = jnp.einsum(
        "bthk,bhkv->bthv",
        response.queries,
        zeroed(change, bad).astype(response.queries.dtype),
        preferred_element_type=change.dtype,
    )
    reads = (run.reads.astype(change.dtype) + reads).astype(run.reads.dtype)
    reads = spoilt(reads, bad[:, None] & jnp.any(response.queries != 0, axis=-1))
    return MemoryRun(reads, states, dataclasses.replace(run.final, weights=states[:, -1]))


def _times(share: jax.Array, change: jax.Array) -> jax.Array:
    """What is left of a change [..., K, V], of which `share` is a number [...] or a matrix [..., K, K].

    Of none nothing is left, though the change be not finite: another document begins between.
    """
    if share.ndim < change.ndim:
        share = share[..., None, None]
        left, some = share * change, share != 0
    else:
        left = jnp.matmul(share, change, precision="highest")
        some = jnp.any(share != 0, axis=(-2, -1), keepdims=True)
    return jnp.where(some, left, 0)


def _start_in_turn(final, initial: OnlineState, goes_on: jax.Array, neighbours: Neighbours) -> OnlineState:
    """The state that this device's run starts from: the recurrence, device after device.

    While one runs the others wait, so it takes as long as on one device; what is read is not in it.

    Args:
      final: the state after this device's tokens, of the one before them.
      initial: what a row starts from.
      goes_on: rows [B] whose first token here goes on with the document before.
      neighbours: the devices.
    """
    # Not kept for the gradient, or there would be as much as on one device: it is made again.
    final = jax.checkpoint(final, prevent_cse=False)

    def turn(start: OnlineState, device: jax.Array) -> tuple[OnlineState, None]:
        left = jax.lax.cond(neighbours.index == device, final, lambda start: start, start)
        received = select_rows(goes_on, neighbours.from_before(left), initial)
        return jax.tree.map(
            lambda new, old: jnp.where(neighbours.index == device + 1, new, old), received, start
        ), None

    start, _ = jax.lax.scan(turn, initial, jnp.arange(neighbours.count - 1, dtype=jnp.int32))
    return start

"""A token of decoding as one Pallas kernel for TPUs, bound by the states that it moves: online and selected.

A step of the grid is a block of a row's heads. The online state comes and goes by Pallas' own pipeline; the
selected states, which differ from head to head, are copied by hand, those of the next step while this one
computes. All stay where they are: inputs are aliased to outputs, and nothing is written of the cache but the
slot of a row that finished a segment, of the anchor nothing but a row that starts a chunk.

A key lies along sublanes and is broadcast along lanes, a value the other way: a product of a vector and a
matrix is then elementwise and a sum along sublanes. The matrix unit would have to be loaded with every state.

Off a TPU the kernel runs in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`.

Shapes: B batch, H heads, G heads of a block, P blocks, N slots, J states that a head selects, K key dim,
V value dim, C coefficients of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._state import OnlineState

# Heads of a block: the code of each is there once.
_HEADS = 8
# In VMEM: the states of a block on their way in and out, twice since the next are on their way.
_STATES_BYTES = 8 << 20


def decode_step(
    state: OnlineState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    states: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    *,
    online_gate: jax.Array,
    slot: jax.Array,
    rule: str,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    previous_step: jax.Array | None,
    chunk_start: jax.Array | None,
) -> tuple[jax.Array, OnlineState, jax.Array]:
    """See `pallas_kernels.decode_step.decode_step`; shapes as there."""
    batch, heads, key_dim = q.shape
    value_dim, choices = v.shape[2], gates.shape[2]
    vectors, coefficients = [q, k, v], [(online_gate, 1.0), (retention, 1.0), (step, 1.0)]
    matrices, anchor, previous = [state.weights], [], state.previous
    if rule == "titans":
        coefficients.append((momentum, 0.0))
        matrices, anchor = [state.weights, state.momentum], [state.anchor]
    if rule == "swla":
        assert previous is not None
        coefficients.append((previous_step, 0.0))
        vectors += previous
        previous = k.astype(jnp.float32), v.astype(jnp.float32)
    if chunk_start is None:
        chunk_start = jnp.zeros((batch,), bool)

    scalars = [
        jnp.full((batch, heads), neutral) if x is None else x.astype(jnp.float32)
        for x, neutral in coefficients
    ]
    scalars = jnp.concatenate([jnp.stack(scalars, axis=2), gates.astype(jnp.float32)], axis=2)
    bytes_moved = 4 * (4 * len(matrices) + 2 * len(anchor)) + 2 * choices * states.dtype.itemsize
    block = _heads_of_block(
        heads, _STATES_BYTES // (_padded(key_dim, 8) * _padded(value_dim, 128) * bytes_moved)
    )
    blocks = heads // block
    vectors = [x.reshape(batch, blocks, block, x.shape[2]) for x in (scalars, *vectors)]

    def small(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, p, *_: (b, p, 0, 0))

    out = jax.ShapeDtypeStruct(vectors[3].shape, q.dtype)
    matrix = pl.BlockSpec((1, block, key_dim, value_dim), lambda b, p, *_: (b, p, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kept = [*matrices, *anchor, states]
    out, matrices, anchor, states = pl.pallas_call(
        functools.partial(_kernel, rule),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, blocks),
            in_specs=[
                [small(x) for x in vectors],
                [matrix] * len(matrices),
                [matrix] * len(anchor),
                anywhere,
            ],
            out_specs=[small(out), [matrix] * len(matrices), [anywhere] * len(anchor), anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, choices, block, key_dim, value_dim), states.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[out, *jax.tree.map(_like, [matrices, anchor, states])],
        # Counted with the three arrays of scalars before them.
        input_output_aliases={3 + len(vectors) + i: 1 + i for i in range(len(kept))},
        name="decode_step",
    )(
        indices.reshape(-1),
        slot,
        chunk_start.astype(jnp.int32),
        vectors,
        matrices,
        anchor,
        states,
    )
    after = OnlineState(
        weights=matrices[0],
        momentum=matrices[1] if rule == "titans" else None,
        anchor=anchor[0] if rule == "titans" else None,
        previous=previous,
    )
    return out.reshape(v.shape), after, states


def _kernel(
    rule,
    indices,
    slot,
    chunk_start,
    vectors,
    matrices,
    anchor,
    _,
    out_GV,
    matrices_after,
    anchor_after,
    cache_BNHKV,
    selected_2JGKV,
    arrivals,
    departures,
):
    row, blocks = pl.program_id(0), pl.num_programs(1)
    number = row * blocks + pl.program_id(1)
    turn = jax.lax.rem(number, 2)
    _, choices, block, *_ = selected_2JGKV.shape
    heads = pl.ds(pl.program_id(1) * block, block)

    def copies(number, act):
        """Start, or await, the copies of the states that the heads of a step select."""
        row, turn = jax.lax.div(number, blocks), jax.lax.rem(number, 2)

        def visit(head, _):
            for choice in range(choices):
                index = indices[(number * block + head) * choices + choice]
                source = cache_BNHKV.at[row, index, jax.lax.rem(number, blocks) * block + head]
                target = selected_2JGKV.at[turn, choice, head]
                act(pltpu.make_async_copy(source, target, arrivals.at[turn]))

        jax.lax.fori_loop(0, block, visit, None)

    @pl.when(number == 0)
    def _():
        copies(number, lambda copy: copy.start())

    @pl.when(number + 1 < pl.num_programs(0) * blocks)
    def _():
        copies(number + 1, lambda copy: copy.start())

    starts = chunk_start[row] != 0
    anchoring = [
        pltpu.make_async_copy(matrices[0], leaf.at[pl.ds(row, 1), heads], departures.at[0])
        for leaf in anchor_after
    ]
    for copy in anchoring:
        pl.when(starts)(copy.start)

    copies(number, lambda copy: copy.wait())
    scalars_GC, query_GK, *written = vectors
    columns = [ref[...].astype(jnp.float32).T for ref in (query_GK, *written[::2])]
    rows = [ref[...].astype(jnp.float32) for ref in written[1::2]]
    reads = []
    for head in range(block):
        here = slice(head, head + 1)
        reads.append(
            _token(
                rule,
                scalars_GC[here],
                [column[:, here] for column in columns],
                [row[here] for row in rows],
                [leaf.at[0, head] for leaf in (*matrices, *anchor)],
                [leaf.at[0, head] for leaf in matrices_after],
                [selected_2JGKV.at[turn, choice, head] for choice in range(choices)],
                starts,
            )
        )
    out_GV[...] = jnp.concatenate(reads, axis=0).astype(out_GV.dtype)

    # A slot that was selected is read by now, and what was read is done with: the state leaves from there.
    @pl.when(slot[row] >= 0)
    def _():
        source = selected_2JGKV.at[turn, 0]
        source[...] = matrices_after[0][0].astype(source.dtype)
        copy = pltpu.make_async_copy(source, cache_BNHKV.at[row, slot[row], heads], departures.at[1])
        copy.start()
        copy.wait()

    for copy in anchoring:
        pl.when(starts)(copy.wait)


def _token(rule, scalars_1C, columns, rows, before, after, selected, starts):
    """Write a head's token, and return what it reads [1, V]; refs of matrices [K, V]."""
    online_gate, retention, step, *more = (scalars_1C[:, c : c + 1] for c in range(scalars_1C.shape[1]))
    gates = more[-len(selected) :]
    query_K1, key_K1, *previous_key = columns
    value_1V, *previous_value = rows
    weights = before[0][...]
    if rule == "titans":
        _, momentum, anchor = before
        error = value_1V - _read(key_K1, jnp.where(starts, weights, anchor[...]))
        surprise = more[0] * momentum[...] + key_K1 * (step * error)
        after[1][...] = surprise
        weights = retention * weights + surprise
    elif rule == "delta":
        weights = retention * weights
        weights += key_K1 * (step * (value_1V - _read(key_K1, weights)))
    else:
        weights = retention * weights + key_K1 * (step * value_1V)
        if rule == "swla":
            weights += previous_key[0] * (more[0] * previous_value[0])
    after[0][...] = weights
    mixed = online_gate * weights
    for gate, state in zip(gates, selected, strict=True):
        # Where there is nothing to read there may be anything.
        mixed += jnp.where(gate != 0, gate * state[...].astype(mixed.dtype), 0)
    return _read(query_K1, mixed)


def _read(vector_K1, matrix_KV):
    return jnp.sum(vector_K1 * matrix_KV, axis=0, keepdims=True)


def _heads_of_block(heads: int, most: int) -> int:
    return max(n for n in range(1, min(heads, _HEADS) + 1) if heads % n == 0 and n <= max(most, 1))


def _padded(dim: int, register: int) -> int:
    return -(-dim // register) * register


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

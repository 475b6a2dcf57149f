"""The dense read of matrices for Hopper's tensor cores: one product over all states, joined along the keys.

o = sum_n g_n (q M_n) is [g_1 q | g_2 q | ...] [M_1; M_2; ...], so one accumulator stays in registers while
states stream through shared memory, one a step. Gates multiply q, and not what comes out of a product: that
would need a second accumulator, and the tensor cores would wait for it to be emptied at every state. The
product g_n q is rounded to bfloat16, as in the TPU's kernel, and goes through shared memory; while the
tensor cores work on one state, the next one's is made.

A block has two warpgroups that compute, with _ROWS queries each, and one that fetches.

B batch, T tokens, H heads, K key dim, V value dim, N states.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_ROWS = 64
_WARPGROUPS = 2
TOKENS = _ROWS * _WARPGROUPS
"""Queries of a block."""
DIMS = 64
"""Dims are multiples of this: 128 bytes of bfloat16, what a swizzle spans."""
MOST_KEY_DIM = 256
# Columns of a block: 64 registers a thread for the accumulator, beside as many at most for queries.
_COLUMNS = 128
# Of the 227 KiB of an H100's shared memory.
_STATES_BYTES = 128 << 10
_MOST_STEPS = 3
_SWIZZLE = (plgpu.TilingTransform((8, DIMS)), plgpu.SwizzleTransform(128))


def read(
    q_BTHK: jax.Array,
    gates_BHNT: jax.Array,
    states_BNHKV: jax.Array,
    length: int,
    segment_length: int | None,
) -> jax.Array:
    """Return the reads [B, T, H, V] in bfloat16.

    Args:
      q_BTHK: bfloat16; T a multiple of TOKENS, K of DIMS and at most MOST_KEY_DIM.
      gates_BHNT: float32.
      states_BNHKV: bfloat16; V a multiple of DIMS.
      length: tokens that are not padding.
      segment_length: as in `gated_state_read`; states that no token of a block may read are not fetched.
    """
    batch, tokens, heads, key_dim = q_BTHK.shape
    count, value_dim = states_BNHKV.shape[1], states_BNHKV.shape[4]
    columns = _COLUMNS if value_dim % _COLUMNS == 0 else DIMS
    steps = min(_MOST_STEPS, _STATES_BYTES // (2 * key_dim * columns))
    # Products in flight while the next gated queries are made, where there is a second place for those.
    late = 1 if key_dim <= 128 else 0

    def kernel(q_gmem, gates_gmem, states_gmem, out_gmem, gated_smem, out_smem, arrived):
        row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        first = jax.lax.axis_index("tokens") * TOKENS
        column = jax.lax.axis_index("columns") * columns
        warpgroup = jax.lax.axis_index("warpgroup")
        readable = count
        if segment_length is not None:
            last = jnp.minimum(first + TOKENS, length) - 1
            readable = jnp.minimum(count, jax.lax.div(last, segment_length))
        tile = (row, pl.ds(first + warpgroup * _ROWS, _ROWS), head)

        def compute(run_pipeline):
            # The queries come in through the place of their products with gates.
            q_smem = gated_smem.at[warpgroup, 0]
            plgpu.copy_gmem_to_smem(q_gmem.at[tile], q_smem, arrived.at[warpgroup])
            plgpu.barrier_wait(arrived.at[warpgroup])
            q = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
            plgpu.commit_smem()  # all have read before anyone writes

            def accumulate(total):
                run_pipeline((q, total))
                out_smem[warpgroup] = total[...].astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_gmem.at[*tile, pl.ds(column, columns)])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(accumulate, plgpu.ACC((_ROWS, columns), jnp.float32))

        def state(indices, states_smem, gates_smem, carry):
            q, total = carry
            (n,) = indices
            gates = plgpu.load(
                gates_smem.at[pl.ds(warpgroup * _ROWS, _ROWS)], layout=plgpu.Layout.WGMMA.reduce(1)
            )
            gated = q.astype(jnp.float32) * jax.lax.broadcast_in_dim(gates, q.shape, [0])
            slot_smem = gated_smem.at[warpgroup, jax.lax.rem(n, late + 1)]
            slot_smem[...] = gated.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(total, slot_smem, states_smem)
            plgpu.wgmma_wait(late)
            return q, total

        plgpu.emit_pipeline_warp_specialized(
            state,  # pyrefly: ignore[bad-argument-type]  # annotated as if nothing were carried
            grid=(readable,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (None, key_dim, columns),
                    lambda n: (n, 0, 0),
                    transforms=_SWIZZLE,
                    delay_release=late,
                ),
                plgpu.BlockSpec((None, TOKENS), lambda n: (n, 0), delay_release=late),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=steps,
            compute_context=compute,
        )(
            states_gmem.at[row, :, head, :, pl.ds(column, columns)],
            gates_gmem.at[row, head, :, pl.ds(first, TOKENS)],
        )

    gated_shape = (_WARPGROUPS, late + 1, _ROWS, key_dim)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, value_dim), jnp.bfloat16),
        scratch_types={
            "gated_smem": plgpu.SMEM(gated_shape, jnp.bfloat16, transforms=_SWIZZLE),
            "out_smem": plgpu.SMEM((_WARPGROUPS, _ROWS, columns), jnp.bfloat16, transforms=_SWIZZLE),
            "arrived": plgpu.Barrier(num_barriers=_WARPGROUPS),
        },
        grid=(value_dim // columns, tokens // TOKENS, heads, batch),
        grid_names=("columns", "tokens", "head", "row"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
    )(q_BTHK, gates_BHNT, states_BNHKV)

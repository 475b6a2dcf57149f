"""What a training step asks of its compiler."""

from pallas_kernels._platform import has_sparse_cores

_OFFLOADED = ("all_gather", "all_reduce", "reduce_scatter")


def compiler_options() -> dict[str, bool]:
    """Return options for `jax.jit`, for the devices of the mesh of `jax.set_mesh`.

    On TPUs with SparseCores (v5p, v6e, tpu7x) these send and receive while the other cores compute, which waits
    for every sending otherwise. A v5e, which has none, overlaps gathers unasked.
    """
    if not has_sparse_cores():
        return {}
    return {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in _OFFLOADED}

"""What a training step asks of its compiler."""

from pallas_kernels._platform import has_sparse_cores, platform

_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "all_reduce", "reduce_scatter")


def compiler_options() -> dict[str, bool | int]:
    """Return options for `jax.jit`, for the devices of the mesh of `jax.set_mesh`.

    On TPUs with SparseCores (v5p, v6e, tpu7x) these send and receive while the other cores compute; without
    them a step waits for all that it sends. A v5e, which has none, overlaps gathers unasked.
    """
    if platform() != "tpu":
        return {}
    # From 64 chips on weights would be gathered by a sum of them and of zeros: twice the bytes.
    options: dict[str, bool | int] = {"xla_tpu_prefer_async_allgather_to_allreduce": True}
    if has_sparse_cores():
        options |= {f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in _OFFLOADED}
        # Gradients of a layer's weights are otherwise summed together: when the last is there, nothing is
        # left to compute meanwhile.
        options["xla_tpu_sparse_core_all_reduce_offload_max_num_operands"] = 1
    return options

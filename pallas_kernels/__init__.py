"""The operations: one folder each, which picks an implementation; they import nothing of mc_jax."""

from pallas_kernels._xla_flags import call_libraries_for_single_products
from pallas_kernels.chunk_memory import chunk_memory, memory_step
from pallas_kernels.decode_step import decode_step
from pallas_kernels.deep_memory import deep_memory, deep_memory_step
from pallas_kernels.routed_read import routed_state_read
from pallas_kernels.short_convolution import short_convolution, unit_length
from pallas_kernels.state_read import gated_state_read

__all__ = [
    "chunk_memory",
    "decode_step",
    "deep_memory",
    "deep_memory_step",
    "gated_state_read",
    "memory_step",
    "routed_state_read",
    "short_convolution",
    "unit_length",
]

call_libraries_for_single_products()

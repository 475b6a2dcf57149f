"""Linear attention with retention: M_t = a_t M_{t-1} + h_t k_t^T v_t (MC eq. 12, where a = h = 1)."""

from mc_jax.memories._interface import Family
from mc_jax.memories._matrix import MatrixMemory

LINEAR = Family(matrix=MatrixMemory("linear", ("retention", "step")))

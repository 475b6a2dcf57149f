"""Linear attention with retention: M_t = a_t M_{t-1} + h_t k_t^T v_t (MC eq. 12, where a = h = 1)."""

from mc_jax.memories._affine import DecayingMemory
from mc_jax.memories._interface import Family

LINEAR = Family(matrix=DecayingMemory("linear", ("retention", "step")))

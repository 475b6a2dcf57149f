"""Sliding-window linear attention: M_t = a_t M_{t-1} + p_t k_{t-1}^T v_{t-1} + h_t k_t^T v_t (MC eq. 28)."""

from mc_jax.memories._affine import DecayingMemory
from mc_jax.memories._interface import Family

SWLA = Family(matrix=DecayingMemory("swla", ("retention", "step", "previous_step")))

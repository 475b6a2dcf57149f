"""Gated delta rule: M_t = a_t (M_{t-1} - h_t k_t^T (k_t M_{t-1})) + h_t k_t^T v_t (arXiv:2412.06464)."""

from mc_jax.memories._affine import DeltaMemory
from mc_jax.memories._interface import Family

DELTA = Family(matrix=DeltaMemory("delta", ("retention", "step")))

"""Titans: steps with momentum on 1/2 |M(k) - v|^2 (arXiv:2501.00663 eq. 13-14).

S_t = m_t S_{t-1} - h_t grad, M_t = a_t M_{t-1} + S_t. The Memory Caching paper prints a minus before S_t,
which with its S climbs the loss.
"""

import functools

from mc_jax.memories._interface import Family
from mc_jax.memories._matrix import MatrixMemory
from mc_jax.memories._mlp import MlpMemory

_COEFFICIENTS = ("retention", "step", "momentum")

TITANS = Family(
    matrix=MatrixMemory("titans", _COEFFICIENTS, takes_gradients=True),
    mlp=functools.partial(MlpMemory, "l2", _COEFFICIENTS),
)

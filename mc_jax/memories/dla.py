"""Deep linear attention: a step on -<M(k), v> for each token (MC eq. 30). On a matrix it is "linear"."""

import functools

from mc_jax.memories._affine import DecayingMemory
from mc_jax.memories._interface import Family
from mc_jax.memories._mlp import MlpMemory

_COEFFICIENTS = ("retention", "step")

DLA = Family(
    matrix=DecayingMemory("linear", _COEFFICIENTS), mlp=functools.partial(MlpMemory, "dot", _COEFFICIENTS)
)

"""Deep linear attention: a step on -<M(k), v> for each token (MC eq. 30). On a matrix it is "linear"."""

from mc_jax.memories._affine import DecayingMemory
from mc_jax.memories._interface import Family
from mc_jax.memories._mlp import MlpMemory

DLA = Family(
    matrix=DecayingMemory("linear", ("retention", "step")), mlp=MlpMemory("dot", ("retention", "step"))
)

"""Deep linear attention: a step on -<M(k), v> for each token (MC eq. 30). On a matrix it is "linear"."""

from mc_jax.memories._interface import Family
from mc_jax.memories._matrix import MatrixMemory
from mc_jax.memories._mlp import MlpMemory

DLA = Family(
    matrix=MatrixMemory("linear", ("retention", "step")), mlp=MlpMemory("dot", ("retention", "step"))
)

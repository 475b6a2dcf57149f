"""Random arguments of the functional core, shared by tests."""

import jax
import jax.numpy as jnp
import pytest

from mc_jax import memories
from mc_jax.facts import AGGREGATION_FACTS

SEGMENT, CHUNK = 8, 4
HEADS, KEY, VALUE, ROUTER, HIDDEN = 2, 3, 2, 4, 5
USED = {name: family.matrix.coefficients for name, family in memories.MEMORIES.items()}
AGGREGATIONS = {
    name: {"top_k": 2} if facts.top_k == "always" else {} for name, facts in AGGREGATION_FACTS.items()
}
WITH_ROUTER = tuple(name for name, facts in AGGREGATION_FACTS.items() if facts.uses_router)


def _memories() -> list[tuple[str, bool]]:
    """Names, and whether the state is an MLP; a matrix that is another's too (dla's is linear's) once."""
    families = memories.MEMORIES.items()
    by_matrix = {family.matrix: name for name, family in reversed(families)}
    matrices = [(name, False) for name, family in families if by_matrix[family.matrix] == name]
    return matrices + [(name, True) for name, family in families if family.mlp is not None]


MEMORIES = _memories()
# Each compiles for seconds, twice over: what all of them must show is shown by one where time counts.
SLOW_BUT_ONE = [MEMORIES[0], *(pytest.param(*memory, marks=pytest.mark.slow) for memory in MEMORIES[1:])]
NAMES = [f"{memory}-mlp" if mlp else memory for memory, mlp in MEMORIES]


def arguments(memory, mlp, aggregation, *, length=21, documents=False, router="inputs", dtype=jnp.float64):
    """Random arguments of the functional core: dict of arrays, by name."""
    keys = iter(jax.random.split(jax.random.key(7), 16))
    value = KEY if mlp else VALUE

    def normal(*shape):
        return jax.random.normal(next(keys), shape, dtype)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    tokens = (2, length, HEADS)
    scalars = {
        "retention": jax.nn.sigmoid(2 + normal(*tokens)),
        "step": jax.nn.sigmoid(normal(*tokens)) * (0.3 if mlp else 1.0),
        "previous_step": jax.nn.sigmoid(normal(*tokens)),
        "momentum": jax.nn.sigmoid(normal(*tokens)),
    }
    found = {
        "q": unit(normal(*tokens, KEY)),
        "k": unit(normal(*tokens, KEY)),
        "v": normal(*tokens, value),
        **{name: scalars[name] for name in USED[memory]},
        "initial_state": (normal(HEADS, KEY, HIDDEN), normal(HEADS, HIDDEN, value))
        if mlp
        else normal(HEADS, KEY, value),
    }
    if aggregation in WITH_ROUTER:
        found["u"] = 3 * normal(*tokens, ROUTER if router == "inputs" else KEY)
        if router == "inputs":
            found["router_keys"] = normal(*tokens, ROUTER)
            found["online_logit"] = normal(*tokens)
    if documents:
        # One starts at a chunk's start inside a segment, one at a segment's start, one ends with the row.
        starts = jnp.array([[4, 16, 20], [8, 12, 16]])
        found["document_ids"] = jnp.sum(jnp.arange(length)[None, :, None] >= starts[:, None], axis=-1)
    return found

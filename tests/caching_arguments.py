"""Random arguments of the functional core, shared by tests."""

import jax
import jax.numpy as jnp
import pytest

SEGMENT, CHUNK = 8, 4
HEADS, KEY, VALUE, ROUTER, HIDDEN = 2, 3, 2, 3, 5
USED = {
    "linear": ("retention", "step"),
    "swla": ("retention", "step", "previous_step"),
    "delta": ("retention", "step"),
    "dla": ("retention", "step"),
    "titans": ("retention", "step", "momentum"),
}
AGGREGATIONS = {
    "none": {},
    "residual": {},
    "gated": {},
    "soup": {},
    "sparse": {"top_k": 2},
    "average": {"top_k": 2},
}
WITH_ROUTER = ("gated", "soup", "sparse")
MEMORIES = [
    ("linear", False),
    ("swla", False),
    ("delta", False),
    ("titans", False),
    ("dla", True),
    ("titans", True),
]
# Each compiles for seconds, twice over: what all of them must show is shown by one where time counts.
SLOW_BUT_ONE = [MEMORIES[0], *(pytest.param(*memory, marks=pytest.mark.slow) for memory in MEMORIES[1:])]
NAMES = ["linear", "swla", "delta", "titans", "dla-mlp", "titans-mlp"]


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
        found["u"] = 3 * normal(*tokens, ROUTER)
        if router == "inputs":
            found["router_keys"] = normal(*tokens, ROUTER)
            found["online_logit"] = normal(*tokens)
    if documents:
        # One starts at a chunk's start inside a segment, one at a segment's start, one ends with the row.
        starts = jnp.array([[4, 16, 20], [8, 12, 16]])
        found["document_ids"] = jnp.sum(jnp.arange(length)[None, :, None] >= starts[:, None], axis=-1)
    return found

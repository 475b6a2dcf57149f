"""Random arguments of a decoding step, shared by its tests."""

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState

RULES = ("linear", "swla", "delta", "titans")


def arguments(rule, *, batch=3, slots=4, heads=2, key_dim=8, value_dim=6, choices=2, dtype=jnp.float32):
    """The arguments of `decode_step` by name; rows append nowhere, to slot 1, to slot 2, ..."""
    keys = iter(jax.random.split(jax.random.key(3), 16))

    def normal(*shape):
        return jax.random.normal(next(keys), (batch, *shape), dtype)

    def matrices(*shape):
        return normal(*shape, key_dim, value_dim) / key_dim**0.5

    def coefficient():
        return jax.nn.sigmoid(normal(heads))

    is_titans = rule == "titans"
    before = (normal(heads, key_dim), normal(heads, value_dim)) if rule == "swla" else None
    found = {
        "state": OnlineState(
            weights=matrices(heads),
            momentum=matrices(heads) if is_titans else None,
            anchor=matrices(heads) if is_titans else None,
            previous=before,
        ),
        "q": normal(heads, key_dim),
        "k": normal(heads, key_dim) / key_dim**0.5,
        "v": normal(heads, value_dim),
        "states": matrices(slots, heads),
        "gates": jax.nn.softmax(normal(heads, choices)),
        "indices": jax.random.randint(next(keys), (batch, heads, choices), 0, slots),
        "online_gate": coefficient(),
        "slot": jnp.array([-1, *(row % slots for row in range(1, batch))], jnp.int32),
        "rule": rule,
        "retention": coefficient(),
        "step": coefficient(),
    }
    if rule == "swla":
        found["previous_step"] = coefficient()
    if is_titans:
        found["momentum"] = coefficient()
        found["chunk_start"] = jnp.arange(batch) % 2 == 0
    return found


def narrow(found, dtype, stored):
    """The same with tokens of one dtype and cached states of another."""
    tokens = {name: found[name].astype(dtype) for name in ("q", "k", "v")}
    return {**found, **tokens, "states": found["states"].astype(stored)}


def with_a_gate_of_zero(found):
    """The same, where the last choice alone is slot 3, by a gate of 0."""
    indices = jnp.minimum(found["indices"], 2).at[..., -1].set(3)
    return {**found, "indices": indices, "gates": found["gates"].at[..., -1].set(0)}

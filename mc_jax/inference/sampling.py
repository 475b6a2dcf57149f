"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token a row from the most probable ones that together hold `top_p` of the probability.

    Args:
      key: a PRNG key.
      logits: [batch, vocabulary], float32.
      temperature: scalar; 0 takes the most probable token.
      top_p: scalar in (0, 1]; 1 keeps all tokens.

    Returns:
      [batch], int32.
    """
    greedy = jnp.argmax(logits, axis=-1)
    logits = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    # A token stays if those before it do not yet reach top_p: the first always does.
    before = jnp.cumsum(probability, axis=-1) - probability
    choice = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf), axis=-1)
    drawn = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
    return jnp.where(temperature <= 0, greedy, drawn).astype(jnp.int32)

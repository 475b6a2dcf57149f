"""Recipes: each module has a function `config()` that returns a `mc_jax.config.Config`."""

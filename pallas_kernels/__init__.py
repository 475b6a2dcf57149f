"""One folder per operation; each op picks an implementation and imports nothing of mc_jax."""

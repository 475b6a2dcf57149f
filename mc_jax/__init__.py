"""mc_jax: recurrent language models with growing memory (Memory Caching, arXiv:2602.24281)."""

"""Cost against length: the time of a layer's reads and writes, forward and backward, as the text grows.

    python -m experiments.cost

One sequence of 4 heads with keys and values of 32, linear memory, segments of 64; each form is timed in turn
at every length, the least of five. Prints a Markdown table: microseconds a token, and the ratio to the form
without a cache. One to two minutes on one core.
"""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mc_jax import memory_caching
from mc_jax.facts import AGGREGATION_FACTS

LENGTHS = (1024, 2048, 4096, 8192, 16384)
FORMS = ("none", "gated", "sparse")
HEADS, DIM, SEGMENT, TOP_K, REPEATS = 4, 32, 64, 2, 5


def timed(aggregation: str, length: int) -> Callable[[], object]:
    """A function that runs the layer once, forward and backward, and waits for it."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, u, pooled = (jax.random.normal(key, (1, length, HEADS, DIM)) for key in keys)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    routing = (u, pooled) if AGGREGATION_FACTS[aggregation].uses_router else (None, None)

    def loss(q, k, v, u, router_keys):
        y, _ = memory_caching(
            q,
            k,
            v,
            u,
            router_keys=router_keys,
            online_logit=None if u is None else jnp.zeros(q.shape[:3]),
            aggregation=aggregation,
            segment_length=SEGMENT,
            top_k=TOP_K if AGGREGATION_FACTS[aggregation].top_k == "always" else None,
        )
        return jnp.sum(jnp.square(y))

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(run(q, k, v, *routing))


def main() -> int:
    """Print the table."""
    forms = " | ".join(f"{form}, µs a token" for form in FORMS)
    print(f"| tokens | {forms} | gated / none | sparse / none |")
    print("|---" * (len(FORMS) + 3) + "|")
    for length in LENGTHS:
        runs = {form: timed(form, length) for form in FORMS}
        least = dict.fromkeys(FORMS, float("inf"))
        for repeat in range(REPEATS + 1):  # the first one compiles
            for form, run in runs.items():
                begin = time.perf_counter()
                run()
                if repeat:
                    least[form] = min(least[form], time.perf_counter() - begin)
        cost = [1e6 * least[form] / length for form in FORMS]
        ratios = [cost[1] / cost[0], cost[2] / cost[0]]
        print(f"| {length:,} | " + " | ".join(f"{x:.1f}" for x in (*cost, *ratios)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

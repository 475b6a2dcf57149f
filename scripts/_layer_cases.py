"""What scripts/bench_kernels sets beside splash attention: the kernels of a layer with cached memories.

"gated" is a linear memory and the dense read of all segments' states, "sparse" a linear memory and the read
of two states a token. Maps, router and gates are not in it, as maps are not in attention's.

The dense read's kernels skip what no token of a block may read. That is counted: by the bounds of their loops
and the conditions of their branches, at each place of the grid. The loops of the sparse read turn as choices
tell: "sparse, spread" takes them to be spread evenly over all states, "sparse, agreeing" to agree as a
trained model's do.
Splash attention's skipped blocks are counted as if they ran, so its kernels are halved; XLA's operations
around them are not.

Shapes: T tokens, H heads, K key dim (and value dim), N states, k choices.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
from _kernel_cases import Case, array, sparse

from mc_jax.parallel.attention import attend
from mc_jax.planning.cost import Cost
from pallas_kernels import chunk_memory, gated_state_read

_DIM, _TOP_K = 128, 2
# Beyond, its gradient has more temporary memory than a chip has: queries' gradients for each block of keys.
_LONGEST_SPLASH = 32768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's kernels at one length."""

    name: str
    """As it is printed."""
    case: Case
    """What runs."""
    share: float = 1.0
    """Of what is counted of its kernels that is run."""
    scale: float = 1.0
    """How many times longer than the case it is."""

    def figures(self, cost: Cost) -> tuple[float, float, float, float]:
        """Return bundles, cycles at the streaming rate and at HBM's peak, and XLA's cycles among them.

        A token and head each.
        """
        xla = cost.xla_cycles
        cycles = (self.share * cost.bundles, self.share * (cost.cycles - xla) + xla)
        at_peak = self.share * (cost.cycles_at_peak - xla) + xla
        scale = self.scale / self.case.token_heads
        bundles, streaming, peak, xla = (scale * n for n in (*cycles, at_peak, xla))
        return bundles, streaming, peak, xla


def layers(tokens: int, *, backward: bool) -> Iterator[Layer]:
    """Yield splash attention first, then ours.

    Heads share nothing, so there are only as many as fit into the memory of a chip. Splash attention is not
    compiled for more than 32,768 tokens: what it does for a token is linear in them.
    """
    heads = 16 if tokens <= _LONGEST_SPLASH // 8 else 4
    compiled = min(tokens, _LONGEST_SPLASH)
    yield Layer(
        name="splash, causal half",
        case=_attention(compiled, min(heads, 2)),
        share=0.5,
        scale=tokens / compiled,
    )
    yield Layer(name="gated, segments of 256", case=_gated(tokens, heads, 256))
    if tokens > 4096:
        yield Layer(name="gated, segments of 1,024", case=_gated(tokens, heads, 1024))
        for name, kernel in (("spread", "pairs"), ("agreeing", "union")):
            yield Layer(name=f"sparse, {name}, segments of 256", case=_sparse(kernel, tokens, heads, 256))


def _attention(tokens, heads) -> Case:
    x = array(1, tokens, heads, _DIM)

    def op(q, k, v, *, implementation):
        return attend(q, k, v, None, None)

    return Case(op=op, shapes=(x, x, x), token_heads=tokens * heads, products=0)


def _gated(tokens, heads, segment) -> Case:
    states = tokens // segment
    x, number = array(1, tokens, heads, _DIM), array(1, tokens, heads, dtype=jnp.float32)

    def op(q, k, v, retention, step, gates, *, implementation):
        online, segments = _online(q, k, v, retention, step, segment, implementation)
        read = functools.partial(gated_state_read, implementation=implementation)
        return online, read(q, gates, segments, segment_length=segment)

    return Case(
        op=op,
        shapes=(x, x, x, number, number, array(1, tokens, heads, states, dtype=jnp.float32)),
        token_heads=tokens * heads,
        products=0,
    )


def _sparse(kernel, tokens, heads, segment) -> Case:
    x, number = array(1, tokens, heads, _DIM), array(1, tokens, heads, dtype=jnp.float32)
    pairs = (1, tokens, heads, _TOP_K)

    def op(q, k, v, retention, step, gates, indices, *, implementation):
        online, segments = _online(q, k, v, retention, step, segment, implementation)
        return online, sparse(kernel, implementation)(q, gates, indices, segments)

    return Case(
        op=op,
        shapes=(x, x, x, number, number, array(*pairs, dtype=jnp.float32), array(*pairs, dtype=jnp.int32)),
        token_heads=tokens * heads,
        products=0,
    )


def _online(q, k, v, retention, step, segment, implementation):
    memory = chunk_memory(
        q,
        k,
        v,
        rule="linear",
        retention=retention,
        step=step,
        segment_length=segment,
        implementation=implementation,
    )
    return memory[:2]

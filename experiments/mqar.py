"""Recall: small models that differ in their mixer alone, on multi-query associative recall.

    python -m experiments.mqar --memory linear --aggregation gated

- Task: 64 tokens with 4, 8 or 16 pairs of 128 symbols, new rows at every step; judged on rows of 16 pairs,
  and on rows of twice the length with 32. `--task multi-key`: 128 tokens with up to 32 pairs, segments of
  16 tokens, each of which holds eight; judged on 32 pairs, in 128 tokens and in 256.
- Model: two layers of width 64, one memory with keys of 8, segments of 8 tokens, nothing but mixers. MLP
  memories add their query to what they read, so keys and values have one width: eight heads of 8.
- Training: 1,000 steps of 2,048 tokens, AdamW, 3e-3 with a cosine, weight decay 0.1, clipping at 1.
- Machine: one core of a processor, half a minute to two minutes a seed.

`mc_jax.nn.MemoryCaching` is used here as in anybody's model; `experiments.mqar_table` runs them all, and
`experiments.mqar_routers` all routers.
"""

import dataclasses
import functools
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._mqar_found import Found, found_by
from mc_jax._arguments import UsageError, parse
from mc_jax.caching import Settings
from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.config import TrainingConfig
from mc_jax.data.mqar import IGNORED, MqarBatch, mqar_batch
from mc_jax.facts import AGGREGATION_FACTS, AggregationFacts, AggregationName, MemoryName
from mc_jax.nn import MemoryCaching
from mc_jax.nn.convolution import ShortConvolution
from mc_jax.nn.norm import RMSNorm
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.step import merge_model, split_model

WIDTH, LAYERS = 64, 2
TOP_K = 2
"""Cached memories that are read where an aggregation always needs to know how many."""
# Where training and evaluation draw their rows from; no seed of one is a seed of the other.
_EVALUATION_SEED = 1_000_000
_STEPS_A_CALL = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Rows that models are trained on and judged by."""

    vocab_size: int
    """Symbols, keys and values."""
    length: int
    """Tokens of a row; judged too on rows of twice as many."""
    pairs: tuple[int, ...]
    """How many pairs a row of training may have; judged with the last."""
    long_pairs: int
    """How many a row of twice the length has."""
    rows: int
    """Rows of a step."""
    segment: int
    """Tokens of a segment, two for each pair that it holds."""


TASKS = {
    "mqar": Task(vocab_size=128, length=64, pairs=(4, 8, 16), long_pairs=32, rows=32, segment=8),
    "multi-key": Task(vocab_size=128, length=128, pairs=(4, 8, 16, 32), long_pairs=32, rows=16, segment=16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to be trained."""

    task: Literal["mqar", "multi-key"] = "mqar"
    """How many pairs there are, and how many a segment holds: four, or eight."""
    memory: MemoryName | Literal["attention"] = "linear"
    """The recurrence; "attention" is softmax attention with the same keys, without a memory."""
    aggregation: AggregationName = "gated"
    """How cached memories are read."""
    segment_init: Literal["checkpoint", "independent"] = "independent"
    """What a segment's memory starts from; with aggregation "none" always a checkpoint."""
    mlp: bool = False
    """The memory is an MLP ("dla", "titans")."""
    key_dim: int = 8
    """Width of keys and queries."""
    top_k: int | None = None
    """Cached memories that are read; None: 2 with "sparse" and "average", and with "null" all."""
    at_once: bool = False
    """Only top_k are read from the first step on, and not all of them at first."""
    router_dim: int | None = None
    """Width of the router's queries and keys; None: that of values, 64."""
    router_blocks: int = 1
    """A segment's score is the best of this many parts of it."""
    router_keys: Literal["inputs", "keys"] = "inputs"
    """What is pooled over a segment to be scored: a learned map of the inputs, or the keys."""
    seeds: int = 3
    """Models that are trained one after the other, with seeds 0, 1, ..."""
    steps: int = 1000
    """Steps of training."""


class SoftmaxMixer(nnx.Module):
    """Causal softmax attention of one head, with the convolution and the gate of `MemoryCaching`."""

    def __init__(self, key_dim: int, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, WIDTH, use_bias=False, rngs=rngs)
        self.query, self.key, self.value = linear(key_dim), linear(key_dim), linear(WIDTH)
        self.convolution = ShortConvolution(2 * key_dim + WIDTH, 4, dtype=jnp.float32, rngs=rngs)
        self.norm, self.gate, self.output = RMSNorm(WIDTH), linear(WIDTH), linear(WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix tokens x [B, T, D]."""
        joined = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        joined = self.convolution(joined)
        dim = self.query.out_features
        q, k, v = jnp.split(joined, (dim, 2 * dim), axis=-1)
        # Keys and queries as wide as values, with zeros, which change nothing but the scale.
        q, k = (jnp.pad(part, ((0, 0), (0, 0), (0, 0), (0, WIDTH - dim))) for part in (q, k))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=dim**-0.5)
        return self.output(self.norm(y[:, :, 0]) * nnx.silu(self.gate(x)))


class RecallModel(nnx.Module):
    """Embedding, two mixers with a norm before each and a sum around it, norm, output map."""

    def __init__(self, cell: Cell, *, rngs: nnx.Rngs):
        # Numbers of size 1: smaller ones are drowned by what the first mixer adds.
        symbols, normal = TASKS[cell.task].vocab_size, nnx.initializers.normal(1.0)
        self.embedding = nnx.Embed(symbols, WIDTH, embedding_init=normal, rngs=rngs)
        self.first, self.second = _mixer(cell, rngs), _mixer(cell, rngs)
        self.norm_0, self.norm_1, self.norm_2 = RMSNorm(WIDTH), RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.head = nnx.Linear(WIDTH, symbols, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, top_k: jax.Array | None) -> jax.Array:
        """Logits [B, T, vocabulary] of tokens [B, T]."""
        return self.read(tokens, top_k)[0]

    def read(
        self, tokens: jax.Array, top_k: jax.Array | None
    ) -> tuple[jax.Array, list[Gates | Selection | None]]:
        """Logits [B, T, vocabulary] of tokens [B, T], and the gates of the mixers that have a memory."""
        x, read = self.embedding(tokens), []
        for mixer, norm in ((self.first, self.norm_0), (self.second, self.norm_1)):
            y = norm(x)
            if isinstance(mixer, MemoryCaching):
                y, gates = mixer.apply(y, None, top_k)
                read.append(gates)
            else:
                y = mixer(y)
            x = x + y
        return self.head(self.norm_2(x)), read


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a cell."""

    accuracy: tuple[float, ...]
    """Share of the values said right on rows of the task's length, for each seed."""
    long_accuracy: tuple[float, ...]
    """The same on rows of twice the length."""
    state_bytes: int
    """Bytes of the online memories of all layers, float32; for attention 0."""
    cache_bytes: int
    """Bytes of the cached memories of all layers after a row, without a router's keys; for attention of keys
    and values."""
    seconds: float
    """Seconds of training, all seeds together, with compiling."""
    found: list[Found] = dataclasses.field(default_factory=list)
    """What the router finds on rows of the task's length, for each seed; empty without one."""


def run(cell: Cell) -> Result:
    """Train and judge.

    Raises:
      ValueError: settings that do not go together.
    """
    _check(cell)
    graph = split_model(nnx.eval_shape(lambda: _build(cell, jax.random.key(0))))[0]
    build = jax.jit(lambda seed: split_model(_build(cell, jax.random.key(seed)))[1])
    training = TrainingConfig(steps=cell.steps, learning_rate=3e-3, warmup_steps=min(100, cell.steps // 10))
    optimizer = make_optimizer(training)
    advance = jax.jit(functools.partial(_advance, graph, optimizer))
    judge = jax.jit(functools.partial(_accuracy, graph))
    rows = evaluation(cell.task)
    ask = jax.jit(lambda parameters: found_by(graph, parameters, rows[0], TASKS[cell.task].segment))
    accuracies: list[tuple[float, ...]] = []
    found: list[Found] = []
    seconds = 0.0
    for seed in range(cell.seeds):
        begin = time.perf_counter()
        parameters = build(jnp.uint32(seed))
        state = optimizer.init(parameters)
        for start in range(0, cell.steps, _STEPS_A_CALL):
            steps = range(start, min(start + _STEPS_A_CALL, cell.steps))
            rates = jnp.array([learning_rate(training, step) for step in steps], jnp.float32)
            top_k = None
            if _anneals(cell):
                top_k = jnp.array([_annealed(cell, step) for step in steps], jnp.int32)
            parameters, state = advance(parameters, state, _batches(cell, seed, steps), rates, top_k)
        jax.block_until_ready(parameters)
        seconds += time.perf_counter() - begin
        accuracies.append(tuple(float(judge(parameters, batch)) for batch in rows))
        if _has_router(cell):
            found.append(Found(**jax.tree.map(lambda x: np.asarray(x).tolist(), ask(parameters))))
    short, long = zip(*accuracies, strict=True)
    return Result(short, long, *_bytes(cell), seconds, found)


def _check(cell: Cell) -> None:
    """See that no setting of the router is ignored that the mixer would not refuse.

    Raises:
      ValueError: one would be.
    """
    settings = ("top_k", "at_once", "router_dim", "router_blocks", "router_keys")
    chosen = [name for name in settings if getattr(cell, name) != getattr(Cell(), name)]
    reason = f"aggregation {cell.aggregation!r}"
    if cell.memory == "attention":
        reason = "memory 'attention'"
    else:
        anneals = _about(cell).can_anneal and _top_k(cell) is not None
        ignored = {"at_once": not anneals, "router_keys": not _about(cell).uses_router}
        chosen = [name for name in chosen if ignored.get(name)]
    if chosen:
        raise ValueError(f"{chosen[0]} has no effect with {reason}; leave it out")


def _has_router(cell: Cell) -> bool:
    return cell.memory != "attention" and _about(cell).uses_router


def evaluation(task_name: str) -> tuple[MqarBatch, MqarBatch]:
    """Rows that a task's models are judged by: of its length, and of twice as many tokens."""
    task = TASKS[task_name]
    draw = functools.partial(mqar_batch, _EVALUATION_SEED, 0, rows=320, vocab_size=task.vocab_size)
    short = draw(length=task.length, pairs=task.pairs[-1])
    return short, draw(length=2 * task.length, pairs=task.long_pairs)


def _mixer(cell: Cell, rngs: nnx.Rngs) -> MemoryCaching | SoftmaxMixer:
    if cell.memory == "attention":
        return SoftmaxMixer(cell.key_dim, rngs)
    return MemoryCaching(
        WIDTH,
        num_heads=8 if cell.mlp else 1,
        key_dim=None if cell.mlp else cell.key_dim,
        settings=Settings(
            memory=cell.memory,
            aggregation=cell.aggregation,
            segment_length=TASKS[cell.task].segment,
            # Without a cache, a memory that starts afresh at each segment would know nothing else.
            segment_init=cell.segment_init if _about(cell).reads_cache else "checkpoint",
            chunk_length=TASKS[cell.task].segment,
            top_k=_top_k(cell),
            router_blocks=cell.router_blocks,
        ),
        mlp=cell.mlp,
        router_keys=cell.router_keys,
        router_dim=cell.router_dim,
        rngs=rngs,
    )


def _about(cell: Cell) -> AggregationFacts:
    return AGGREGATION_FACTS[cell.aggregation]


def _build(cell: Cell, key: jax.Array) -> RecallModel:
    return RecallModel(cell, rngs=nnx.Rngs(params=key))


def _advance(graph: Any, optimizer: Any, parameters, state, batches, rates, top_k):
    """Some steps of one model: tokens and labels [steps, B, T], learning rates and top_k [steps]."""

    def loss(parameters, batch, top_k):
        logits = merge_model(graph, parameters)(batch.tokens, top_k)
        asked = batch.labels != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
        return jnp.sum(jnp.where(asked, losses, 0.0)) / jnp.sum(asked).astype(losses.dtype)

    def step(carry, scanned):
        parameters, state = carry
        batch, rate, top_k = scanned
        gradient = jax.grad(loss)(parameters, batch, top_k)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, state = optimizer.update(gradient, state, parameters)
        parameters = jax.tree.map(lambda value, update: value - rate * update, parameters, updates)
        return (parameters, state), None

    return jax.lax.scan(step, (parameters, state), (batches, rates, top_k))[0]


def _accuracy(graph: Any, parameters, batch) -> jax.Array:
    right = jnp.argmax(merge_model(graph, parameters)(batch.tokens, None), axis=-1) == batch.labels
    return jnp.sum(right) / jnp.sum(batch.labels != IGNORED)


def _batches(cell: Cell, seed: int, steps: range) -> MqarBatch:
    """Tokens and labels [steps, B, T]."""
    task = TASKS[cell.task]
    sizes = {"rows": task.rows, "length": task.length, "pairs": task.pairs, "vocab_size": task.vocab_size}
    draw = functools.partial(mqar_batch, seed, **sizes)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[draw(step) for step in steps])


def _anneals(cell: Cell) -> bool:
    # With top_k = 1 or 2 from the start little gradient reaches the segments that were not chosen.
    is_memory = cell.memory != "attention" and not cell.at_once
    return is_memory and _about(cell).can_anneal and _top_k(cell) is not None


def _top_k(cell: Cell) -> int | None:
    return TOP_K if cell.top_k is None and _about(cell).top_k == "always" else cell.top_k


def _annealed(cell: Cell, step: int) -> int:
    """From all segments of a row down to top_k in the first half of training."""
    task, top_k = TASKS[cell.task], _top_k(cell)
    assert top_k is not None, "only then it is annealed"
    segments = task.length // task.segment
    share = min(1.0, 2 * step / cell.steps)
    return round(segments + (top_k - segments) * share)


def _bytes(cell: Cell) -> tuple[int, int]:
    """Bytes of online and of cached memories of all layers after a row, in float32; no router's keys."""
    task = TASKS[cell.task]
    if cell.memory == "attention":
        return 0, 4 * LAYERS * task.length * (cell.key_dim + WIDTH)
    state = 2 * 4 * 8 * WIDTH if cell.mlp else cell.key_dim * WIDTH
    cached = task.length // task.segment - 1 if _about(cell).reads_cache else 0
    return 4 * LAYERS * state, 4 * LAYERS * state * cached


def main(arguments: list[str]) -> int:
    """Train one cell and print what became of it; 2 where the settings do not go together."""
    try:
        cell = parse(Cell, arguments, program="python -m experiments.mqar")
        if cell.seeds < 1 or cell.steps < 1:
            raise UsageError(f"seeds is {cell.seeds} and steps {cell.steps}; set both to 1 or more")
        result = run(cell)
    except (UsageError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in dataclasses.asdict(result).items():
        print(f"{name.replace('_', ' '):14} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

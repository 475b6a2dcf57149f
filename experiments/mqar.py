"""Recall: small models that differ in their mixer alone, on multi-query associative recall.

    python -m experiments.mqar --memory linear --aggregation gated

- Task: 64 tokens with 4, 8 or 16 pairs of 128 symbols, new rows at every step; judged on rows of 16 pairs,
  and on rows of twice the length with 32.
- Model: two layers of width 64, one memory with keys of 8, segments of 8 tokens, nothing but mixers. MLP
  memories add their query to what they read, so keys and values have one width: eight heads of 8.
- Training: 1,000 steps of 32 rows, AdamW, 3e-3 with a cosine, weight decay 0.1, clipping at 1.
- Machine: one core of a processor, half a minute to two minutes a seed.

`mc_jax.nn.MemoryCaching` is used here as in anybody's model; `experiments.mqar_table` runs them all.
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

from mc_jax._arguments import UsageError, parse
from mc_jax.caching import Settings
from mc_jax.config import TrainingConfig
from mc_jax.data.mqar import IGNORED, MqarBatch, mqar_batch
from mc_jax.facts import AGGREGATION_FACTS, AggregationFacts, AggregationName, MemoryName
from mc_jax.nn import MemoryCaching
from mc_jax.nn.convolution import ShortConvolution
from mc_jax.nn.norm import RMSNorm
from mc_jax.training.optimizer import learning_rate, make_optimizer
from mc_jax.training.step import merge_model, split_model

VOCAB, LENGTH, PAIRS, LONG, LONG_PAIRS = 128, 64, (4, 8, 16), 128, 32
WIDTH, LAYERS, SEGMENT = 64, 2, 8
TOP_K = 2
# Where training and evaluation draw their rows from; no seed of one is a seed of the other.
_EVALUATION_SEED = 1_000_000
_STEPS_A_CALL = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to be trained."""

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
        self.embedding = nnx.Embed(VOCAB, WIDTH, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.first, self.second = _mixer(cell, rngs), _mixer(cell, rngs)
        self.norm_0, self.norm_1, self.norm_2 = RMSNorm(WIDTH), RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, top_k: jax.Array | None) -> jax.Array:
        """Logits [B, T, vocabulary] of tokens [B, T]."""
        x = self.embedding(tokens)
        for mixer, norm in ((self.first, self.norm_0), (self.second, self.norm_1)):
            y = norm(x)
            x = x + (mixer(y, None, top_k) if isinstance(mixer, MemoryCaching) else mixer(y))
        return self.head(self.norm_2(x))


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a cell."""

    accuracy: tuple[float, ...]
    """Share of the values said right on 64 tokens and 16 pairs, for each seed."""
    long_accuracy: tuple[float, ...]
    """The same on 128 tokens and 32 pairs."""
    state_bytes: int
    """Bytes of the online memories of all layers, float32; for attention 0."""
    cache_bytes: int
    """Bytes of the cached memories of all layers after 64 tokens; for attention of keys and values."""
    seconds: float
    """Seconds of training, all seeds together, with compiling."""


def run(cell: Cell) -> Result:
    """Train and judge.

    Raises:
      ValueError: settings that do not go together.
    """
    graph = split_model(nnx.eval_shape(lambda: _build(cell, jax.random.key(0))))[0]
    build = jax.jit(lambda seed: split_model(_build(cell, jax.random.key(seed)))[1])
    training = TrainingConfig(steps=cell.steps, learning_rate=3e-3, warmup_steps=min(100, cell.steps // 10))
    optimizer = make_optimizer(training)
    advance = jax.jit(functools.partial(_advance, graph, optimizer))
    judge = jax.jit(functools.partial(_accuracy, graph))
    accuracies: list[tuple[float, ...]] = []
    seconds = 0.0
    for seed in range(cell.seeds):
        begin = time.perf_counter()
        parameters = build(jnp.uint32(seed))
        state = optimizer.init(parameters)
        for start in range(0, cell.steps, _STEPS_A_CALL):
            steps = range(start, min(start + _STEPS_A_CALL, cell.steps))
            rates = jnp.array([learning_rate(training, step) for step in steps], jnp.float32)
            top_k = jnp.array([_top_k(cell, step) for step in steps], jnp.int32) if _anneals(cell) else None
            parameters, state = advance(parameters, state, _batches(seed, steps), rates, top_k)
        jax.block_until_ready(parameters)
        seconds += time.perf_counter() - begin
        accuracies.append(tuple(float(judge(parameters, rows)) for rows in _evaluation()))
    short, long = zip(*accuracies, strict=True)
    return Result(short, long, *_bytes(cell), seconds)


def _evaluation() -> list[MqarBatch]:
    draw = functools.partial(mqar_batch, _EVALUATION_SEED, 0, rows=320, vocab_size=VOCAB)
    return [draw(length=LENGTH, pairs=PAIRS[-1]), draw(length=LONG, pairs=LONG_PAIRS)]


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
            segment_length=SEGMENT,
            # Without a cache, a memory that starts afresh at each segment would know nothing else.
            segment_init=cell.segment_init if _about(cell).reads_cache else "checkpoint",
            chunk_length=SEGMENT,
            top_k=TOP_K if _about(cell).top_k == "always" else None,
        ),
        mlp=cell.mlp,
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


def _batches(seed: int, steps: range) -> MqarBatch:
    """Tokens and labels [steps, B, T]."""
    draw = functools.partial(mqar_batch, seed, rows=32, length=LENGTH, pairs=PAIRS, vocab_size=VOCAB)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[draw(step) for step in steps])


def _anneals(cell: Cell) -> bool:
    # With top_k = 1 or 2 from the start little gradient reaches the segments that were not chosen.
    return cell.memory != "attention" and _about(cell).can_anneal


def _top_k(cell: Cell, step: int) -> int:
    """From all segments of a row down to `TOP_K` in the first half of training."""
    segments = LENGTH // SEGMENT
    share = min(1.0, 2 * step / cell.steps)
    return round(segments + (TOP_K - segments) * share)


def _bytes(cell: Cell) -> tuple[int, int]:
    """Bytes of online and of cached memories of all layers after a row of 64 tokens, in float32."""
    if cell.memory == "attention":
        return 0, 4 * LAYERS * LENGTH * (cell.key_dim + WIDTH)
    state = 2 * 4 * 8 * WIDTH if cell.mlp else cell.key_dim * WIDTH
    cached = LENGTH // SEGMENT - 1 if _about(cell).reads_cache else 0
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

"""FLOPs of a training step by formula: what the mathematics asks for, whatever a program makes of it.

Forward, of a token; a multiplication and an addition are two.

- maps: 2 for each number of a matrix that multiplies the token, the output map included (the embedding's
  rows are looked up, which takes none);
- a memory, per head, of matrices A x B (a matrix: K x V; an MLP: K x E and E x V, E = 4 V): a write 2AB, an
  online read 2AB, and 2C(A + B) for the pairs of tokens in a chunk of C (docs/math.md section 7); where
  errors are written, what it takes to make them: delta and titans k M, 2KV; an MLP's hidden features 2KE and
  their gradient 2EV, and for titans, and wherever the branch is bounded, its output, 2EV more;
- cached reads, per head: 2AB for each memory that is read: of the n segments before the token's own all n, or
  top_k of them if fewer, or with logarithmic segmentation a group for each 1 among the binary digits of n;
  and, with a router, 2PR for each of the n scores, of P blocks and the router's R (V unless `router_dim`);
- attention: 4D for each token that is seen, its own included: the causal half, or a window.

Backward is twice as much. What is computed again to save memory is not counted, and neither are norms,
convolutions, gates and the optimizer. That less is read after a document's end within a row is left out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from mc_jax.config import Config, ModelConfig
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS
from mc_jax.planning.parts import matrices, parameter_part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one token's forward pass, by part, and of a step."""

    maps: dict[str, float]
    """Matrices that multiply the token, by part."""
    memories: float
    """Writes and online reads."""
    cached_reads: float
    """Reads of cached memories, and the router's scores."""
    attention: float
    """Scores and values, without the maps."""
    tokens: int
    """Tokens in a step."""

    @property
    def forward(self) -> float:
        """FLOPs of one token, forward."""
        return sum(self.maps.values()) + self.memories + self.cached_reads + self.attention

    @property
    def token(self) -> float:
        """FLOPs of one token, forward and backward."""
        return 3 * self.forward

    @property
    def step(self) -> float:
        """FLOPs of a step on all chips, forward and backward."""
        return self.tokens * self.token


def flops_of(config: Config, parameters: Any, *, places: int | None = None) -> Flops:
    """Return the FLOPs of a step.

    Args:
      config: the model, and its rows.
      parameters: the model's tree, of arrays or of their shapes.
      places: of each layer for cached memories, where the oldest are forgotten; None: one for each segment.
    """
    model, length = config.model, config.data.context_length
    maps: dict[str, float] = {}
    for path, leaf in matrices(parameters):
        part = parameter_part(path, model)
        if part == "embedding":
            if not model.tie_embeddings:
                continue
            part = "output map"
        maps[part] = maps.get(part, 0.0) + 2.0 * leaf.size
    layers = {kind: _layers(model, kind) for kind in ("memory", "attention", "window")}
    attention = 4.0 * model.model_dim * layers["attention"] * mean_seen(length, None)
    if layers["window"]:
        attention += 4.0 * model.model_dim * layers["window"] * mean_seen(length, model.attention_window)
    heads = layers["memory"] * model.num_heads
    return Flops(
        maps=maps,
        memories=heads * memory_flops(model),
        cached_reads=heads * cached_flops(model, length, places),
        attention=attention,
        tokens=config.training.batch_size * length,
    )


def memory_flops(model: ModelConfig) -> float:
    """Write and online read of a token in one head, forward."""
    dim = model.model_dim // model.num_heads
    flops = sum(4.0 * a * b + 2.0 * model.chunk_length * (a + b) for a, b in state_matrices(model))
    hidden = 4 * dim
    writes_errors = MEMORY_FACTS[model.memory].writes_errors
    if model.memory_depth == 2:
        needs_output = writes_errors or model.memory_branch != "plain"
        flops += 4.0 * dim * hidden + (2.0 * dim * hidden if needs_output else 0.0)
    elif writes_errors:
        flops += 2.0 * dim * dim
    return flops


def cached_flops(model: ModelConfig, length: int, places: int | None = None) -> float:
    """Reads of cached memories, and their scores, of a row's mean token in one head, forward.

    `places` is as of `flops_of`.
    """
    aggregation = AGGREGATION_FACTS[model.aggregation]
    if not aggregation.reads_cache:
        return 0.0
    read = sum(2.0 * a * b for a, b in state_matrices(model))
    scored = 2.0 * router_numbers(model)
    eligible = mean_eligible(length, model.segment_length, places)
    if model.segmentation == "logarithmic":
        return read * mean_groups(length, model.segment_length) + scored * eligible
    most = [number for number in (model.top_k, places) if number is not None]
    return read * mean_eligible(length, model.segment_length, min(most, default=None)) + scored * eligible


def mean_eligible(length: int, segment_length: int, most: int | None) -> float:
    """Segments before a token's own, at most `most`, in the mean over a row's tokens."""
    return _mean(length, segment_length, lambda before: before if most is None else min(before, most))


def mean_groups(length: int, segment_length: int) -> float:
    """Groups of logarithmic segmentation before a token's own segment, in the mean over a row's tokens."""
    return _mean(length, segment_length, int.bit_count)


def _mean(length: int, segment_length: int, memories: Callable[[int], int]) -> float:
    """Memories that a row's mean token has, from those of a token with so many segments before its own."""
    total = 0
    for start in range(0, length, segment_length):
        total += min(segment_length, length - start) * memories(start // segment_length)
    return total / length


def mean_seen(length: int, window: int | None) -> float:
    """Tokens that a token attends to, its own included, in the mean over a row's tokens."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def state_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """The sizes of the matrices that are one head's memory."""
    dim = model.model_dim // model.num_heads
    return [(dim, 4 * dim), (4 * dim, dim)] if model.memory_depth == 2 else [(dim, dim)]


def router_numbers(model: ModelConfig) -> int:
    """How many numbers of a cached segment one head's router multiplies for its score, which are kept too."""
    if not AGGREGATION_FACTS[model.aggregation].uses_router:
        return 0
    dim = model.model_dim // model.num_heads if model.router_dim is None else model.router_dim
    return model.router_blocks * dim


def _layers(model: ModelConfig, kind: str) -> int:
    return model.num_layers * model.layer_pattern.count(kind) // len(model.layer_pattern)

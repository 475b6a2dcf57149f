"""What a run is made of: frozen dataclasses, one field a decision.

A recipe (a function that returns a `Config`) is the only place where values are chosen; the command line
overrides single fields (`--model.segment-length 128`).
"""

import dataclasses
import math
from typing import Literal

from mc_jax.facts import MEMORY_FACTS, AggregationName, MemoryName

Segmentation = Literal["constant", "logarithmic"]
SegmentInit = Literal["checkpoint", "independent"]
LayerKind = Literal["memory", "attention", "window"]
Remat = Literal["none", "maps", "states", "blocks", "offload"]


class ConfigError(ValueError):
    """A setting that cannot be: the message says which field, why, and the cure, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model: blocks of a Memory Caching mixer and a SwiGLU MLP (docs/math.md section 5)."""

    num_layers: int = 12
    """Number of blocks."""
    model_dim: int = 768
    """Width of the residual stream; key and value dims are model_dim / num_heads."""
    num_heads: int = 16
    """Memories per layer; must divide model_dim."""
    mlp_dim: int = 2048
    """Hidden width of the SwiGLU MLP."""
    memory: MemoryName = "linear"
    """The recurrence: how tokens are written to a memory."""
    memory_depth: Literal[1, 2] | None = None
    """State of "dla" and "titans": 1 a matrix, 2 an MLP. None for the others, whose state is a matrix."""
    memory_branch: Literal["bounded", "plain"] | None = None
    """What an MLP memory adds to its query: "bounded" stays finite, "plain" is the paper's and may become
    NaN. None: "bounded", or that the state is a matrix."""
    aggregation: AggregationName = "gated"
    """How the online and the cached memories are read together; "none" is the base recurrence."""
    segment_length: int = 256
    """Tokens after which the memory's state is cached; a multiple of chunk_length."""
    segmentation: Segmentation = "constant"
    """Every segment is a memory, or a token's segments are grouped by the digits of their number."""
    segment_init: SegmentInit = "checkpoint"
    """A segment goes on from the last one's state, or starts afresh ("independent")."""
    chunk_length: int = 64
    """Tokens that are processed together by matrix products; divides segment_length."""
    top_k: int | None = None
    """Cached memories that "sparse" and "average" read, and "null", where None is all; None otherwise."""
    router_blocks: int = 1
    """A segment's score is the best of this many parts of it; 1 is the paper's mean."""
    router_keys: Literal["inputs", "keys"] = "inputs"
    """What is pooled over a segment to be scored: a learned map of the inputs, or the keys."""
    router_dim: int | None = None
    """Width per head of the router's queries and of its map of the inputs; None: that of values. With "keys"
    it is theirs."""
    online_logit: Literal["learned", "running_mean"] = "learned"
    """The logit of the online memory, or of "null"'s null: a learned map of the input, or the score of the
    segment so far."""
    cache_scale: Literal["learned"] | None = None
    """Factor per head on what cached memories change of a read: "learned" from 0, with which a memory that is
    added to a trained model changes nothing at first. None: 1."""
    convolution_width: int = 4
    """Width of the causal depth-wise convolution after the q, k and v maps; 1 is none."""
    tie_embeddings: bool = True
    """Use the embedding as the output map."""
    layer_pattern: tuple[LayerKind, ...] = ("memory",)
    """Mixers of successive layers, repeated: Memory Caching, attention, sliding-window attention."""
    attention_window: int | None = None
    """Tokens that "window" layers see, their own included; None without such layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The origin of the tokens, and how they are laid in rows."""

    corpus: str = "austen"
    """An embedded corpus ("austen", "pairs"), or a folder that `mc-jax prepare` wrote."""
    tokenizer: Literal["bytes", "bpe"] | None = "bytes"
    """Tokenizer of an embedded corpus; None with a prepared folder, which has its own."""
    vocab_size: int | None = None
    """Vocabulary of the "bpe" tokenizer, which is trained on the training text; None otherwise."""
    context_length: int = 4096
    """Tokens in a row: documents are packed into rows, and memories reset at their starts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimizer, schedule, precision, checkpoints."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 8
    """Rows in an optimizer step."""
    accumulation: int = 1
    """Parts a batch is cut into, whose gradients are summed; must divide batch_size."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" takes the maps within blocks, and AdamW the rest; both at one learning rate."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    learning_rate_factors: tuple[str, ...] | None = None
    """Parts with a learning rate of their own: "PATTERN=FACTOR", for example "router_query=10 mlp=0.1"; the
    factor is of the scheduled rate, weight decay included. None: one rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine to the end, the peak with a linear decay at the end, or the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int | None = None
    """Steps of the linear decay of "wsd"; None with the others."""
    final_learning_rate: float = 0.0
    """The rate at which "cosine" and "wsd" end."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    train: tuple[str, ...] | None = None
    """Patterns of the parameters that are trained ("router_query", "blocks_0", "mixer.*"); None: all."""
    freeze: tuple[str, ...] | None = None
    """Patterns of parameters that are not, though `train` may have them; None: none."""
    adapter_rank: int | None = None
    """Rank of low-rank adapters beside the wide maps of the blocks, trained in place of the maps, on weights
    of `--init`; `train` names what is trained whole beside them, `freeze` maps that get none. None: none."""
    top_k_anneal_steps: int = 0
    """Steps over which "sparse" goes from reading all cached memories to top_k; 0: top_k from the start."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of activations; weights stay float32. None: float32 on CPU, bfloat16 elsewhere."""
    remat: Remat = "none"
    """What a block computes again for its gradient: "none", "maps" (all but linear maps and memories),
    "states" (all but runs and reads of memories), "blocks" (all, from its input), "offload" (the same, inputs
    waiting in the host's memory). "maps" is the fastest on TPUs: what "none" keeps takes longer to move."""
    seed: int = 0
    """Seeds initial weights and the order of rows."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of training, replica x fsdp x sequence x tensor of them; no result depends on it."""

    replica: int = -1
    """Copies of weights and optimizer state, which split a batch; -1: one a slice, or what fsdp leaves."""
    fsdp: int = -1
    """Devices that split a batch, and weights and optimizer state among them; -1: all that are left."""
    sequence: int = 1
    """Devices that split a row's tokens: each has a run of whole segments, so that sequence x segment_length
    must divide context_length. States and pooled keys go between them; of attention, all keys and values."""
    tensor: int = 1
    """Devices that split the heads and MLPs of a row's model; must divide num_heads and mlp_dim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out results while a run trains and at its end, and the sample of its report."""

    every: int | None = None
    """Steps between held-out results while training, which the last one has too; None: at the end alone."""
    tokens: int | None = None
    """Held-out tokens of each of these, spread evenly over the text; None: all, as at the end."""
    stride: int | None = None
    """Tokens scored per window of a long document, the rest of it being context; None: half a window."""
    batch_size: int = 8
    """Windows evaluated together."""
    sample_prompt: str | None = None
    """What the sample in the report goes on from; None: the first words of the run's own held-out text."""
    sample_tokens: int = 200
    """Length of that sample, in tokens; 0: none is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def learning_rate_factors(training: TrainingConfig) -> dict[str, float]:
    """The factors of the learning rate by the patterns of the parts that have one.

    Raises:
      ConfigError: one is no "PATTERN=FACTOR", its factor is not above 0, or its pattern has two.
    """
    name, factors = "training.learning_rate_factors", dict[str, float]()
    for entry in training.learning_rate_factors or ():
        pattern, _, text = entry.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 < factor < math.inf:
            raise ConfigError(
                f"{name} has {entry!r}; write PATTERN=FACTOR with a factor above 0, "
                "for example router_query=10"
            )
        if pattern in factors:
            raise ConfigError(f"{name} has {pattern} twice; leave one out")
        factors[pattern] = factor
    return factors


def document_alignment(model: ModelConfig) -> int:
    """Documents start at multiples of this many tokens in a row.

    A chunk of "titans", or of an MLP memory, takes its gradients at one state, so it holds one document.
    """
    takes_gradients = MEMORY_FACTS[model.memory].takes_gradients or model.memory_depth == 2
    return model.chunk_length if takes_gradients else 1

"""What a run is made of: frozen dataclasses, one field a decision, checked before anything is compiled.

A recipe (a function that returns a `Config`) is the only place where values are chosen; the command line
overrides single fields (`--model.segment-length 128`). `validate` names the field and the cure.
"""

import dataclasses
import difflib
import json
import math
import types
from typing import Any, Literal, Union, get_args, get_origin

MemoryName = Literal["linear", "swla", "delta", "dla", "titans"]
AggregationName = Literal["none", "residual", "gated", "soup", "sparse", "average"]
Segmentation = Literal["constant", "logarithmic"]
SegmentInit = Literal["checkpoint", "independent"]
LayerKind = Literal["memory", "attention", "window"]


class ConfigError(ValueError):
    """A setting that cannot be: the message says which field, why, and the cure, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model: blocks of a Memory Caching mixer and a SwiGLU MLP (MATH.md section 5)."""

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
    """Cached memories that "sparse" and "average" read; None with the others."""
    router_blocks: int = 1
    """A segment's score is the best of this many parts of it; 1 is the paper's mean."""
    router_keys: Literal["inputs", "keys"] = "inputs"
    """What is pooled over a segment to be scored: a learned map of the inputs, or the keys."""
    online_logit: Literal["learned", "running_mean"] = "learned"
    """The online memory's logit: a learned map of the input, or the score of the segment so far."""
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
    """Where the tokens come from and how they are laid in rows."""

    corpus: str = "austen"
    """An embedded corpus ("austen"), or a folder that `mc-jax prepare` wrote."""
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
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up before the cosine decay."""
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    top_k_anneal_steps: int = 0
    """Steps over which "sparse" goes from reading all cached memories to top_k; 0: top_k from the start."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of activations; weights stay float32. None: float32 on CPU, bfloat16 elsewhere."""
    seed: int = 0
    """Seeds initial weights and the order of rows."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of training: their number is replica x fsdp x tensor, and no result depends on it."""

    replica: int = -1
    """Copies of weights and optimizer state, which split a batch; -1: one a slice, or what fsdp leaves."""
    fsdp: int = -1
    """Devices that split a batch, and weights and optimizer state among them; -1: all that are left."""
    tensor: int = 1
    """Devices that split the heads and MLPs of a row's model; must divide num_heads and mlp_dim."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out result and the sample at a run's end."""

    stride: int | None = None
    """Tokens scored per window of a long document, the rest of it being context; None: half a window."""
    batch_size: int = 8
    """Windows evaluated together."""
    sample_prompt: str = "It is a truth universally acknowledged"
    """What the sample in the report goes on from."""
    sample_tokens: int = 200
    """Length of that sample, in tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def validate(config: Config) -> Config:
    """Return `config` if its settings fit together.

    Raises:
      ConfigError: at the first contradiction; one line with field, reason and cure.
    """
    model, data, training, evaluation = config.model, config.data, config.training, config.evaluation
    for part, section in (
        ("model", model),
        ("data", data),
        ("training", training),
        ("mesh", config.mesh),
        ("evaluation", evaluation),
    ):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            _must_fit(f"{part}.{field.name}", value, field.type)
            smallest = 0 if field.name in _MAY_BE_ZERO else 1
            fills = part == "mesh" and field.default == -1
            if type(value) is int and value < smallest and not (fills and value == -1):
                other = ", or to -1" if fills else ""
                raise ConfigError(f"{part}.{field.name} is {value}; set it to {smallest} or more{other}")
    _check_model(model)
    if training.top_k_anneal_steps and model.aggregation != "sparse":
        raise ConfigError(
            f"training.top_k_anneal_steps has no effect with model.aggregation {model.aggregation!r}; "
            "set it to 0, or model.aggregation to 'sparse'"
        )
    align = document_alignment(model)
    _must_divide("model.chunk_length", align, "data.context_length", data.context_length)
    _must_divide("training.accumulation", training.accumulation, "training.batch_size", training.batch_size)
    if training.warmup_steps > training.steps:
        raise ConfigError(
            f"training.warmup_steps {training.warmup_steps} is more than training.steps {training.steps}; "
            f"set training.warmup_steps to {training.steps} or less"
        )
    for name in ("learning_rate", "gradient_clip"):
        if getattr(training, name) <= 0:
            raise ConfigError(f"training.{name} is {getattr(training, name)}; set it above 0")
    for name in ("final_learning_rate", "weight_decay"):
        if getattr(training, name) < 0:
            raise ConfigError(f"training.{name} is {getattr(training, name)}; set it to 0 or more")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise ConfigError(f"training.{name} is {getattr(training, name)}; set it in [0, 1)")
    if data.tokenizer == "bpe" and data.vocab_size is None:
        raise ConfigError("data.tokenizer 'bpe' has no size; set data.vocab_size, for example to 4096")
    if data.tokenizer != "bpe" and data.vocab_size is not None:
        raise ConfigError(
            f"data.vocab_size {data.vocab_size} has no effect with data.tokenizer {data.tokenizer!r}; "
            "set data.tokenizer to 'bpe' or data.vocab_size to None"
        )
    if evaluation.stride is not None and evaluation.stride > data.context_length:
        raise ConfigError(
            f"evaluation.stride {evaluation.stride} is more than data.context_length {data.context_length}; "
            f"set evaluation.stride to {data.context_length} or less"
        )
    return config


_MAY_BE_ZERO = ("warmup_steps", "top_k_anneal_steps", "sample_tokens", "seed")


def _check_model(model: ModelConfig) -> None:
    _must_divide("model.num_heads", model.num_heads, "model.model_dim", model.model_dim)
    _must_divide("model.chunk_length", model.chunk_length, "model.segment_length", model.segment_length)
    _must_divide("model.router_blocks", model.router_blocks, "model.segment_length", model.segment_length)
    _must_divide(
        "layers in model.layer_pattern", len(model.layer_pattern), "model.num_layers", model.num_layers
    )
    deep = model.memory in ("dla", "titans")
    _must_go_together("model.memory_depth", model.memory_depth, deep, f"model.memory {model.memory!r}", "2")
    reads_top_k = model.aggregation in ("sparse", "average")
    aggregation = f"model.aggregation {model.aggregation!r}"
    _must_go_together("model.top_k", model.top_k, reads_top_k, aggregation, "2")
    windowed = "window" in model.layer_pattern
    pattern = f"model.layer_pattern {' '.join(model.layer_pattern)}"
    _must_go_together("model.attention_window", model.attention_window, windowed, pattern, "1024")
    if model.router_blocks > 1 and model.aggregation not in ("gated", "soup", "sparse"):
        raise ConfigError(f"model.router_blocks has no effect with {aggregation}; set it to 1")
    if model.segmentation == "logarithmic":
        if model.aggregation != "gated":
            raise ConfigError(
                f"model.segmentation 'logarithmic' is not defined with {aggregation}; "
                "set model.aggregation to 'gated'"
            )
        if model.router_blocks > 1:
            raise ConfigError("model.router_blocks needs model.segmentation 'constant'; set it to 1")
        if model.segment_init == "independent" and model.memory != "linear":
            raise ConfigError(
                f"independent segments of model.memory {model.memory!r} cannot be merged; "
                "set model.segment_init to 'checkpoint'"
            )


def _must_go_together(name: str, value: Any, wanted: bool, reason: str, example: str) -> None:
    if wanted and value is None:
        raise ConfigError(f"{reason} needs {name}; set it, for example to {example}")
    if not wanted and value is not None:
        raise ConfigError(f"{name} {value!r} has no effect with {reason}; set it to None")


_KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "True or False", type(None): "None"}


def _must_fit(path: str, value: Any, hint: Any) -> None:
    """See that a value is what the field's annotation says: a recipe and a config.json may hold anything."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if not any(_fits(value, option) for option in options):
        raise ConfigError(f"{path} is {value!r}; set it to {' or '.join(map(_describe, options))}")


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        return type(value) is tuple and bool(value) and all(_fits(x, get_args(option)[0]) for x in value)
    if option is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is option


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        return f"one or more of {_describe(get_args(option)[0])}"
    return _KINDS[option]


def _must_divide(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        down, up = value // divisor * divisor, (value // divisor + 1) * divisor
        choices = f"{up}" if down == 0 else f"{down} or {up}"
        raise ConfigError(
            f"{divisor_name} {divisor} does not divide {name} {value}; set {name} to {choices}, "
            f"or {divisor_name} to a divisor of {value}"
        )


def document_alignment(model: ModelConfig) -> int:
    """Documents start at multiples of this many tokens in a row.

    A chunk of "titans", or of an MLP memory, takes its gradients at one state, so it holds one document.
    """
    return model.chunk_length if model.memory == "titans" or model.memory_depth == 2 else 1


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` was given.

    Raises:
      ConfigError: for a section or field that is not known, with the nearest known name.
    """
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    built = {}
    for name, content in values.items():
        _must_be_known(name, name, sections)
        section_type: Any = sections[name]
        known = {field.name for field in dataclasses.fields(section_type)}
        for field in content:
            _must_be_known(f"{name}.{field}", field, known)
        # JSON has no tuples.
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        built[name] = section_type(**fields)
    return Config(**built)


def _must_be_known(path: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise ConfigError(f"there is no setting {path}; {cure}")


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ: {"model.num_layers": (value in config, value in other)}."""
    first, second = to_dict(config), to_dict(other)
    return {
        f"{section}.{name}": (value, second[section][name])
        for section, content in first.items()
        for name, value in content.items()
        if value != second[section][name]
    }


def to_json(config: Config) -> str:
    """The config as indented JSON text."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config of a `config.json`.

    Raises:
      ConfigError: the text is not JSON, or not of a config.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config.json is not JSON ({error}); restore it, or start the run anew") from error
    return from_dict(values)

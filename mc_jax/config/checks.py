"""Whether the settings of a run fit together; if not, one line names the field, why, and the cure."""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from mc_jax.config.settings import (
    Config,
    ConfigError,
    ModelConfig,
    document_alignment,
    learning_rate_factors,
)
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS, names_with


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
            must_fit(f"{part}.{field.name}", value, field.type)
            smallest = 0 if field.name in _MAY_BE_ZERO else 1
            fills = part == "mesh" and field.default == -1
            if type(value) is int and value < smallest and not (fills and value == -1):
                other = ", or to -1" if fills else ""
                raise ConfigError(f"{part}.{field.name} is {value}; set it to {smallest} or more{other}")
    _check_model(model)
    if training.top_k_anneal_steps and not can_anneal(model):
        reason = f"model.aggregation {model.aggregation!r}"
        cure = f"model.aggregation to {names_with(AGGREGATION_FACTS, 'can_anneal')}"
        if AGGREGATION_FACTS[model.aggregation].can_anneal:
            reason, cure = "model.top_k None", "model.top_k to 1 or more"
        raise ConfigError(f"training.top_k_anneal_steps has no effect with {reason}; set it to 0, or {cure}")
    if training.adapter_rank is not None and training.optimizer != "adamw":
        raise ConfigError(
            f"training.optimizer {training.optimizer!r} has no effect on training.adapter_rank "
            f"{training.adapter_rank}, for it takes whole maps; set it to 'adamw'"
        )
    align = document_alignment(model)
    _must_divide("model.chunk_length", align, "data.context_length", data.context_length)
    _must_divide("training.accumulation", training.accumulation, "training.batch_size", training.batch_size)
    if training.warmup_steps > training.steps:
        raise ConfigError(
            f"training.warmup_steps {training.warmup_steps} is more than training.steps {training.steps}; "
            f"set training.warmup_steps to {training.steps} or less"
        )
    schedule = f"training.schedule {training.schedule!r}"
    decays = training.schedule == "wsd"
    _must_go_together("training.decay_steps", training.decay_steps, decays, schedule, "100")
    if training.warmup_steps + (training.decay_steps or 0) > training.steps:
        raise ConfigError(
            f"training.warmup_steps {training.warmup_steps} and training.decay_steps {training.decay_steps} "
            f"are more than training.steps {training.steps}; "
            f"set training.decay_steps to {training.steps - training.warmup_steps} or less"
        )
    if training.schedule == "constant" and training.final_learning_rate:
        raise ConfigError(
            f"training.final_learning_rate {training.final_learning_rate} has no effect with {schedule}; "
            "set it to 0"
        )
    learning_rate_factors(training)
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
    if evaluation.tokens is not None and evaluation.every is None:
        raise ConfigError(
            f"evaluation.tokens {evaluation.tokens} has no effect without evaluation.every; "
            "set evaluation.every, for example to 100, or evaluation.tokens to None"
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
    memory, aggregation = MEMORY_FACTS[model.memory], AGGREGATION_FACTS[model.aggregation]
    with_memory = f"model.memory {model.memory!r}"
    with_aggregation = f"model.aggregation {model.aggregation!r}"
    _must_go_together("model.memory_depth", model.memory_depth, memory.may_be_mlp, with_memory, "2")
    if model.memory_branch is not None and model.memory_depth != 2:
        raise ConfigError(
            f"model.memory_branch {model.memory_branch!r} has no effect with model.memory_depth "
            f"{model.memory_depth}; set it to None, or model.memory_depth to 2"
        )
    if aggregation.top_k != "optional":
        always = aggregation.top_k == "always"
        _must_go_together("model.top_k", model.top_k, always, with_aggregation, "2")
    windowed = "window" in model.layer_pattern
    pattern = f"model.layer_pattern {' '.join(model.layer_pattern)}"
    _must_go_together("model.attention_window", model.attention_window, windowed, pattern, "1024")
    if model.router_blocks > 1 and not aggregation.uses_router:
        raise ConfigError(f"model.router_blocks has no effect with {with_aggregation}; set it to 1")
    if model.router_dim is not None and (model.router_keys == "keys" or not aggregation.uses_router):
        reason = "model.router_keys 'keys'" if aggregation.uses_router else with_aggregation
        raise ConfigError(f"model.router_dim {model.router_dim} has no effect with {reason}; set it to None")
    if model.cache_scale is not None and not aggregation.reads_cache:
        raise ConfigError(
            f"model.cache_scale {model.cache_scale!r} has no effect with {with_aggregation}; set it to None, "
            "or model.aggregation to one that reads a cache"
        )
    if model.segmentation == "logarithmic":
        if not aggregation.reads_groups:
            raise ConfigError(
                f"model.segmentation 'logarithmic' is not defined with {with_aggregation}; "
                f"set model.aggregation to {names_with(AGGREGATION_FACTS, 'reads_groups')}"
            )
        if model.router_blocks > 1:
            raise ConfigError("model.router_blocks needs model.segmentation 'constant'; set it to 1")
        if model.segment_init == "independent" and not memory.can_merge:
            raise ConfigError(
                f"independent segments of {with_memory} cannot be merged; "
                "set model.segment_init to 'checkpoint'"
            )


def can_anneal(model: ModelConfig) -> bool:
    """Whether training can go from reading all cached memories to top_k of them."""
    return AGGREGATION_FACTS[model.aggregation].can_anneal and model.top_k is not None


def _must_go_together(name: str, value: Any, wanted: bool, reason: str, example: str) -> None:
    if wanted and value is None:
        raise ConfigError(f"{reason} needs {name}; set it, for example to {example}")
    if not wanted and value is not None:
        raise ConfigError(f"{name} {value!r} has no effect with {reason}; set it to None")


_KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "True or False", type(None): "None"}


def must_fit(path: str, value: Any, hint: Any) -> None:
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

"""The capacity dial: a trained model read otherwise than it was trained, with the same weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mc_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    can_anneal,
    differences,
    document_alignment,
    validate,
)
from mc_jax.config.checks import must_fit
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.training.run import Run, model_shapes
from mc_jax.training.step import Parameters, merge_model, split_model

DIAL = (
    "model.segment_length",
    "model.aggregation",
    "model.top_k",
    "model.segmentation",
    "data.context_length",
    "evaluation.stride",
    "evaluation.batch_size",
)
"""The settings that can be turned after training."""


def turn(run: Run, changes: Mapping[str, Any]) -> Run:
    """The run with its weights in a model of other settings, and what it was trained with beside them.

    Args:
      run: as `load_run` read it, on whatever mesh.
      changes: values of settings of `DIAL`, for example {"model.aggregation": "sparse", "model.top_k": 2}.

    Raises:
      ValueError: as `turned_config`; or the settings need weights that the run has not.
    """
    config = turned_config(run.config, changes)
    graph, wanted = model_shapes(config, run.dataset.tokenizer.vocab_size)
    there = split_model(run.model)[1]
    missing = _missing(wanted, there)
    if missing:
        raise _needs_weights(str(run.folder), config, missing, changes)
    model = merge_model(graph, _part(wanted, there))
    return dataclasses.replace(run, config=config, model=model, trained=run.trained or run.config)


def turned_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings of a trained model with some changed, and with those what cannot stay as it was.

    An aggregation that knows no top_k, router or logarithmic segmentation leaves these out, and the chunks of
    a memory for which they are but a way to compute become shorter where they would not divide a segment.

    Args:
      config: what the model was trained with.
      changes: as of `turn`.

    Raises:
      ValueError: a setting that cannot be turned, that would have no effect, or that contradicts another.
    """
    for name in changes:
        if name not in DIAL:
            raise ValueError(f"{name} cannot be turned after training; those that can are {', '.join(DIAL)}")
    by_section: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "evaluation": {}}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        by_section[section][field] = value
    of_model = by_section["model"]
    if of_model and "memory" not in config.model.layer_pattern:
        raise ConfigError(
            f"model.{next(iter(of_model))} has no effect on a model without memory layers; leave it out"
        )
    model = dataclasses.replace(config.model, **of_model)
    for field in dataclasses.fields(model):
        must_fit(f"model.{field.name}", getattr(model, field.name), field.type)
    model = dataclasses.replace(model, **_implied(model, of_model))
    if (
        model.segment_length != config.model.segment_length
        and not AGGREGATION_FACTS[model.aggregation].reads_cache
        and model.segment_init == "checkpoint"
    ):
        raise ConfigError(
            f"model.segment_length {model.segment_length} has no effect with model.aggregation "
            f"{model.aggregation!r}, which caches nothing; leave it out"
        )
    training = config.training
    if not can_anneal(model):
        training = dataclasses.replace(training, top_k_anneal_steps=0)
    return validate(
        dataclasses.replace(
            config,
            model=model,
            training=training,
            data=dataclasses.replace(config.data, **by_section["data"]),
            evaluation=dataclasses.replace(config.evaluation, **by_section["evaluation"]),
        )
    )


def must_have_weights(folder: str, trained: Config, changes: Mapping[str, Any]) -> None:
    """See that a model trained with these settings has the weights that the turned ones need; none is read.

    Args:
      folder: the run's, to name it.
      trained: its settings.
      changes: as of `turn`.

    Raises:
      ValueError: as `turn`.
    """
    turned = turned_config(trained, changes)
    there, wanted = (_shapes(config) for config in (trained, turned))
    if missing := _missing(wanted, there):
        raise _needs_weights(folder, turned, missing, changes)


def _shapes(config: Config) -> Parameters:
    return model_shapes(config, vocab_size=2)[1]  # of any vocabulary, as all have one


def _needs_weights(folder: str, config: Config, missing: list[str], changes: Mapping[str, Any]) -> ValueError:
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
    return ValueError(
        f"model.aggregation {config.model.aggregation!r} needs weights that {folder} was not trained "
        f"with ({', '.join(missing)}); train them: mc-jax train RECIPE --name NAME {flags}"
    )


def turned_settings(run: Run) -> dict[str, tuple[Any, Any]]:
    """Settings of a run's model and its window that differ from training: the trained value, and the read."""
    return {
        name: (trained, read)
        for name, (read, trained) in differences(run.config, run.trained or run.config).items()
        if name.startswith(("model.", "data.context_length"))
    }


def _implied(model: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What cannot stay as it was trained beside the settings that are given, and was not given itself."""
    implied: dict[str, Any] = {}
    aggregation = AGGREGATION_FACTS[model.aggregation]
    if "aggregation" in given:
        if aggregation.top_k == "never":
            implied["top_k"] = None
        if not aggregation.uses_router:
            implied["router_blocks"] = 1
            implied["router_dim"] = None
        if not aggregation.reads_cache:
            implied["cache_scale"] = None
        if not aggregation.reads_groups:
            implied["segmentation"] = "constant"
    if given.get("segmentation") == "logarithmic":
        implied["router_blocks"] = 1
    length = given.get("segment_length")
    # Other memories take their gradients at a chunk's start: there it is a part of what they compute.
    if type(length) is int and length > 0 and document_alignment(model) == 1:
        implied["chunk_length"] = math.gcd(length, model.chunk_length)
    return {name: value for name, value in implied.items() if name not in given}


def _missing(wanted: Parameters, there: Parameters) -> list[str]:
    """Names of the maps that the wanted parameters have and those that are there have not."""
    found: list[str] = []
    for name, part in wanted.items():
        if name not in there:
            found.append(name)
        elif isinstance(part, dict):
            found += _missing(part, there[name])
    return sorted(set(found))


def _part(wanted: Parameters, there: Parameters) -> Parameters:
    """Those of the parameters that are wanted: a model without a router leaves its maps out."""
    return {
        name: _part(part, there[name]) if isinstance(part, dict) else there[name]
        for name, part in wanted.items()
    }

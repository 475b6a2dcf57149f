"""Every setting of a run, checked before anything is compiled."""

from mc_jax.config.checks import can_anneal, validate
from mc_jax.config.files import differences, from_dict, from_json, to_dict, to_flat_dict, to_json
from mc_jax.config.settings import (
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LayerKind,
    MeshConfig,
    ModelConfig,
    Remat,
    Segmentation,
    SegmentInit,
    TrainingConfig,
    document_alignment,
    learning_rate_factors,
)
from mc_jax.facts import AggregationName, MemoryName

__all__ = [
    "AggregationName",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LayerKind",
    "MemoryName",
    "MeshConfig",
    "ModelConfig",
    "Remat",
    "SegmentInit",
    "Segmentation",
    "TrainingConfig",
    "can_anneal",
    "differences",
    "document_alignment",
    "from_dict",
    "from_json",
    "learning_rate_factors",
    "to_dict",
    "to_flat_dict",
    "to_json",
    "validate",
]

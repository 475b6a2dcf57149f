"""Every setting of a run, checked before anything is compiled."""

from mc_jax.config.checks import validate
from mc_jax.config.files import differences, from_dict, from_json, to_dict, to_flat_dict, to_json
from mc_jax.config.settings import (
    AggregationName,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LayerKind,
    MemoryName,
    MeshConfig,
    ModelConfig,
    Remat,
    Segmentation,
    SegmentInit,
    TrainingConfig,
    document_alignment,
)

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
    "differences",
    "document_alignment",
    "from_dict",
    "from_json",
    "to_dict",
    "to_flat_dict",
    "to_json",
    "validate",
]

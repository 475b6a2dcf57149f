"""The optimizer without its learning rate, and the schedule that gives one for each step.

The learning rate is an argument of the compiled step, so a change of schedule compiles nothing anew.
"""

import math
from typing import Any

import jax
import optax

from mc_jax.config import Config, TrainingConfig

_MATRICES = ("kernel", "embedding")


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with gradient clipping; its updates are still to be multiplied by minus the learning rate.

    Weight decay is decoupled and falls on matrices alone: not on biases, norms, rates or convolution taps.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the step after `step` finished ones: a linear warm-up, then a cosine to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def annealed_top_k(config: Config, step: int) -> int:
    """Cached memories that the step after `step` finished ones reads: from all of a row's down to top_k."""
    top_k = config.model.top_k
    assert top_k is not None
    segments = config.data.context_length // config.model.segment_length
    share = min(1.0, step / config.training.top_k_anneal_steps)
    return max(top_k, round(segments + (top_k - segments) * share))


def _is_matrix(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, parameters)

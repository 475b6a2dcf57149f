"""The optimizer without its learning rate, and the schedule that gives one for each step.

The learning rate is an argument of the compiled step, so a change of schedule compiles nothing anew.
"""

import math
from typing import Any

import jax
import optax
import optax.contrib

from mc_jax.config import Config, TrainingConfig, learning_rate_factors
from mc_jax.training.factors import with_factors
from mc_jax.training.patterns import is_wide_map

_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")
# Root mean square of Muon's updates: about that of AdamW's, whose learning rate then fits (arXiv:2502.16982).
_MUON_SIZE = 0.2


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """The optimizer with gradient clipping; updates are still to be multiplied by minus the learning rate.

    "muon" makes the momentum of each layer's wide maps orthogonal (arXiv:2502.16982; momentum 0.95, Nesterov)
    and leaves embeddings, output map, vectors and what is narrow to AdamW. Weight decay is decoupled and
    falls on matrices alone: not on biases, norms, rates or convolution taps. Updates have the
    `learning_rate_factors` of their parameters in them.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=1e-8)
    scale = adam
    if config.optimizer == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_muon_dimensions),
            optax.stateless(lambda updates, _: jax.tree.map(_of_muon_size, updates)),
        )
        scale = optax.partition({"muon": muon, "adam": adam}, _labels)
    whole = optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
    )
    return with_factors(whole, learning_rate_factors(config))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of the step after `step` finished ones: a linear warm-up, then as the schedule says."""
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    match config.schedule:
        case "constant":
            share = 1.0
        case "wsd":
            assert config.decay_steps is not None
            share = min(1.0, (config.steps - step) / config.decay_steps)
        case "cosine":
            progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
            share = 0.5 * (1 + math.cos(math.pi * progress))
    return final + (peak - final) * share


def annealed_top_k(config: Config, step: int) -> int:
    """Cached memories that the step after `step` finished ones reads: from all of a row's down to top_k."""
    top_k = config.model.top_k
    assert top_k is not None
    segments = config.data.context_length // config.model.segment_length
    share = min(1.0, step / config.training.top_k_anneal_steps)
    return max(top_k, round(segments + (top_k - segments) * share))


def _labels(parameters: Any) -> Any:
    def label(path: Any, _: Any) -> str:
        # A map of one or a few numbers a head is no matrix to be made orthogonal.
        return "muon" if is_wide_map(".".join(key.key for key in path)) else "adam"

    return jax.tree_util.tree_map_with_path(label, parameters)


def _muon_dimensions(parameters: Any) -> Any:
    """Muon's dimension numbers for kernels [layers, in, out]: each layer's is a matrix of its own."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), parameters)


def _of_muon_size(update: jax.Array) -> jax.Array:
    """An orthogonal update [..., in, out], whose mean square is 1 / max(in, out), scaled to Muon's size."""
    return update * (_MUON_SIZE * max(update.shape[-2:]) ** 0.5)


def _is_matrix(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, parameters)

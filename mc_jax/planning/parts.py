"""Which part of the model a parameter belongs to, and which an operation of the compiled step."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from mc_jax.config import ModelConfig
from mc_jax.planning.cost import kernel_name
from mc_jax.planning.program import Operation

OPTIMIZER = "optimizer"
COMPILER = "the compiler's own"  # such as other layouts: it says of these nowhere what they are for
UNKNOWN = "unknown source"

# Functions and files of the frames around an operation, the inmost frame first: the first that fits tells.
_FUNCTIONS = (
    (r"SwiGLU\b", "MLP"),
    (r"Attention\b", "attention"),
    (r"RMSNorm\b", "norms"),
    (r"ShortConvolution\b", "mixer, convolution"),
    (r"(_Retention|_Fraction)\b", "mixer, coefficients"),
    (r"MemoryCaching\b", "mixer, maps"),
    (r"LanguageModel\._embed", "embedding"),
    (r"LanguageModel\.(_logits|output_map)|cross_entropy", "output map and loss"),
    (r"(gather_layer|_moved)\b", "weights brought together"),
    (r"LanguageModel\._scan", "kept between layers"),
    (r"token_losses|value_and_grad", "output map and loss"),
    (r"make_step\b", OPTIMIZER),
)
_FILES = (
    (r"/optax/", OPTIMIZER),
    (r"/training/optimizer", OPTIMIZER),
    (r"/pallas_kernels/short_convolution/", "mixer, convolution"),
    (r"/pallas_kernels/(state_read|routed_read)/", "mixer, cached reads"),
    (r"/pallas_kernels/|/mc_jax/memories/", "mixer, writes and online reads"),
    (r"/caching/(router|aggregations|segments|reading|logarithmic)", "mixer, router and gates"),
    (r"/mc_jax/(caching|parallel/memory)", "mixer, around the memory"),
    (r"/parallel/cross_entropy", "output map and loss"),
    (r"/parallel/attention|/splash_attention/", "attention"),
)
# Kernels of packages whose calls the compiler's program has no source of.
_KERNELS = ((r"splash_mha_", "attention"),)
_COPIES = re.compile(r"^(copy|transpose|bitcast|slice|reshape|pad|concatenate|dynamic-(update-)?slice)")


def parameter_part(path: tuple[Any, ...], model: ModelConfig) -> str:
    """Return the part of a parameter at a path of nested dicts, such as "mixer (linear)" or "MLP"."""
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if keys[-2:-1] == ["norm"] or keys[-2:-1] in (["mixer_norm"], ["mlp_norm"]):
        return "norms"
    if not keys[0].startswith("blocks_"):
        return "output map" if keys[0] == "head" else keys[0]
    kind = model.layer_pattern[int(keys[0].removeprefix("blocks_"))]
    if keys[1] == "mlp":
        return "MLP"
    if keys[2].startswith("router_") or keys[2] in ("online_logit", "cache_scale"):
        return "router"
    return f"mixer ({model.memory if kind == 'memory' else kind})"


def by_part(parameters: Any, model: ModelConfig) -> dict[str, int]:
    """Count the numbers of a tree of parameters, or of their shapes, part by part."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(parameters):
        part = parameter_part(path, model)
        found[part] = found.get(part, 0) + math.prod(leaf.shape)
    return found


def matrices(parameters: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield path and leaf of what multiplies each token: maps, adapters, the embedding (as output map)."""
    for path, leaf in jax.tree.leaves_with_path(parameters):
        if path[-1].key in ("kernel", "embedding", "lora_a", "lora_b"):
            yield path, leaf


def operation_part(operation: Operation) -> str:
    """Return the part of the step that an operation was traced in, or `UNKNOWN` where the tables lack it."""
    for frame in operation.frames:
        for pattern, part in _FUNCTIONS:
            if re.search(rf"\b(?:{pattern})", frame.function):
                return part
        for pattern, part in _FILES:
            if re.search(pattern, frame.file):
                return part
    if operation.is_kernel:
        for pattern, part in _KERNELS:
            if re.match(pattern, kernel_name(operation.name)):
                return part
    return UNKNOWN if operation.frames or operation.source or operation.is_kernel else COMPILER


def operation_work(operation: Operation) -> str:
    """Return what an operation does: a kernel, matrix products, copies, or something element by element."""
    if operation.is_kernel:
        return f"kernel {kernel_name(operation.name)}"
    if operation.products:
        return "matrix products"
    if _COPIES.match(operation.kind) or (operation.kind == "fusion" and _COPIES.match(operation.name)):
        return "copies and transposes"
    return "element by element"

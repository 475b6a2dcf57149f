"""Where each parameter of the language model lies, and each of the optimizer's numbers on it.

A parameter is a path in nested dicts, with one name a dimension. What a matrix maps from or to the residual
stream ("model") is divided among the devices that share a batch; the other side, if it is heads or hidden
features, among those that share a row.
"""

import itertools
import math
from typing import Any

import jax

from mc_jax.parallel.rules import WHERE_IT_DIVIDES, axes_of, is_sharded, spec

_FROM_MODEL = ("model", "heads")
_DIMENSIONS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "model"),
    "head.kernel": ("model", "vocab"),
    # Small, and multiplied by activations, whose last dimension is whole.
    "norm.scale": (None,),
    "mixer_norm.scale": (None,),
    "mlp_norm.scale": (None,),
    "mlp.gate.kernel": ("model", "mlp"),
    "mlp.input.kernel": ("model", "mlp"),
    "mlp.output.kernel": ("mlp", "model"),
    **{
        f"mixer.{name}.kernel": _FROM_MODEL
        for name in ("query", "key", "value", "router_query", "router_key", "online_logit", "output_gate")
    },
    **{f"mixer.{name}.map.kernel": _FROM_MODEL for name in ("retention", "momentum", "step_size")},
    **{f"mixer.{name}.map.bias": ("heads",) for name in ("retention", "momentum", "step_size")},
    "mixer.previous_step.map.kernel": _FROM_MODEL,
    "mixer.previous_step.map.bias": ("heads",),
    "mixer.retention.log_rate": ("heads",),
    "mixer.output.kernel": ("heads", "model"),
    "mixer.norm.scale": (None,),
    # Queries, keys and values side by side, which no cut between heads divides.
    "mixer.convolution.taps": (None, None),
    "mixer.initial.w_in": ("heads", None, "hidden"),
    "mixer.initial.w_out": ("heads", "hidden", None),
}


def shardings(tree: Any) -> Any:
    """Of a tree of arrays or their shapes with parameters in it: a tree of shardings on the current mesh.

    Raises:
      ValueError: a parameter that nobody has said anything about.
    """
    mesh = jax.sharding.get_mesh()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.NamedSharding(mesh, _spec(path, leaf.shape)), tree
    )


def constrain_tree[T](tree: T) -> T:
    """Tell the compiler where the leaves of such a tree lie, in a traced program."""
    if not is_sharded():
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, _spec(path, leaf.shape)), tree
    )


def _spec(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.P:
    # The optimizer's moments are at paths that end as their parameters' do, after an attribute's name.
    names = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    keys = [key.key for key in names][::-1]
    if not keys:
        assert len(shape) < 2, "only numbers, and a few of them, are no parameters"
        return jax.P()
    is_layer = keys[0].startswith("blocks_")
    name = ".".join(keys[is_layer:])
    if name not in _DIMENSIONS:
        raise ValueError(f"where does parameter {name} lie? name its dimensions in mc_jax/parallel")
    dimensions = (None, *_DIMENSIONS[name]) if is_layer else _DIMENSIONS[name]
    assert len(dimensions) == len(shape), f"{name} has dimensions {dimensions} and shape {shape}"
    sizes = jax.sharding.get_abstract_mesh().shape
    kept = []
    for dimension, size in zip(dimensions, shape, strict=True):
        parts = math.prod(sizes[axis] for axis in axes_of(dimension))
        kept.append(None if dimension in WHERE_IT_DIVIDES and size % parts else dimension)
    return spec(*kept)

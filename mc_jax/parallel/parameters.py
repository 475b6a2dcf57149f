"""The sharding of each parameter of the language model, and of the optimizer's numbers on it.

A parameter is a path in nested dicts, with one name a dimension. What a matrix maps from or to the residual
stream ("model") is divided among the devices that share a batch; the other side, if it is heads or hidden
features, among those that share a row.
"""

import functools
import itertools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mc_jax.parallel.rules import WHERE_IT_DIVIDES, axes_of, is_sharded, spec

_FROM_MODEL = ("model", "heads")
_SHARED_BY_BATCH = ("model", "hidden")
GATHERED = "gathered_weights"
"""For policies of `jax.checkpoint`: what `gather_layer` brought together."""
_OF_MAPS = (".kernel", ".lora_a", ".lora_b")
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
    "mixer.cache_scale": ("heads",),
    "mixer.output.kernel": ("heads", "model"),
    "mixer.norm.scale": (None,),
    # Queries, keys and values side by side, which no cut between heads divides.
    "mixer.convolution.taps": (None, None),
    "mixer.initial.w_in": ("heads", None, "hidden"),
    "mixer.initial.w_out": ("heads", "hidden", None),
}


def shardings(tree: Any) -> Any:
    """The shardings on the current mesh of a tree of arrays, or of their shapes, with parameters in it.

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


def gather_layer[T](parameters: T, dtype: Any) -> T:
    """A layer's parameters as its devices use them, in a traced program.

    What a row's devices share stays divided; what the devices of a batch share is brought together, in the
    dtype of the products where nothing else uses it. Gradients go the opposite way. That is said out loud:
    the compiler would rather multiply while it passes weights round in a ring, in loops of small products.

    Args:
      parameters: a block's state, or nested dicts of its arrays, without the axis of layers.
      dtype: of activations.
    """

    def gather(path, leaf):
        # The leaves of Flax's variables are at an attribute of theirs.
        name = ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        # Maps to coefficients multiply in float32.
        is_map = name.endswith(_OF_MAPS) and ".map." not in name
        narrow = leaf.astype(dtype) if is_map else leaf
        if not is_sharded():
            return narrow
        divided = _divided(_dimensions(name), leaf.shape)
        whole = [None if dimension in _SHARED_BY_BATCH else dimension for dimension in divided]
        return checkpoint_name(_moved(narrow, spec(*divided), spec(*whole)), GATHERED)

    return jax.tree_util.tree_map_with_path(gather, parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: jax.P, here: jax.P) -> jax.Array:
    """X, which lies as `there` says, as `here` says; its gradient goes the other way."""
    return jax.lax.with_sharding_constraint(x, here)


_moved.defvjp(
    # Not by `_moved` itself: `jax.checkpoint` would see a call there, and save what it returns.
    lambda x, there, here: (jax.lax.with_sharding_constraint(x, here), None),
    # Summed first, divided then: said in one word, it would be a ring of small products again.
    lambda there, here, _, bar: (
        jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(bar, here), there),
    ),
)


def _spec(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.P:
    keys = _keys(path)
    if not keys:
        assert len(shape) < 2, "only numbers, and a few of them, are no parameters"
        return jax.P()
    is_layer = keys[0].startswith("blocks_")
    dimensions = _dimensions(".".join(keys[is_layer:]))
    return spec(*_divided((None, *dimensions) if is_layer else dimensions, shape))


def _keys(path: tuple[Any, ...]) -> list[str]:
    # The optimizer's moments are at paths that end as their parameters' do, after an attribute's name.
    names = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return [key.key for key in names][::-1]


def _dimensions(name: str) -> tuple[str | None, ...]:
    adapted, _, matrix = name.partition(".lora.")
    if matrix:
        # What an adapter maps from and to is divided as its map's is; its rank is whole.
        first, last = _dimensions(f"{adapted}.kernel")
        return (first, None) if matrix == "lora_a" else (None, last)
    if name not in _DIMENSIONS:
        raise ValueError(f"where does parameter {name} lie? name its dimensions in mc_jax/parallel")
    return _DIMENSIONS[name]


def _divided(dimensions: tuple[str | None, ...], shape: tuple[int, ...]) -> list[str | None]:
    """The names, without those of dimensions that the mesh does not divide and that may stay whole."""
    assert len(dimensions) == len(shape), f"dimensions {dimensions} of shape {shape}"
    sizes = jax.sharding.get_abstract_mesh().shape
    kept = []
    for dimension, size in zip(dimensions, shape, strict=True):
        parts = math.prod(sizes[axis] for axis in axes_of(dimension))
        kept.append(None if dimension in WHERE_IT_DIVIDES and size % parts else dimension)
    return kept

"""Low-rank adapters (arXiv:2106.09685): beside a map W that is kept, a product A B that is trained.

x W becomes x W + (x A) B, which is Flax's `nnx.LoRALinear`. A [in, rank] is drawn (He, uniform), and B
[rank, out] is zero, so that at first nothing is added. The product is not scaled: alpha is the rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_A, _B = ".lora.lora_a", ".lora.lora_b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """The maps of a model that have adapters, and the adapters' rank."""

    rank: int
    """Columns of A, and rows of B."""
    maps: tuple[str, ...]
    """Names of the maps: "blocks_0.mixer.query"."""

    def of(self, part: str) -> "Adapters":
        """Those of a part of the model, the maps named as the part knows them."""
        start = f"{part}."
        inside = tuple(name.removeprefix(start) for name in self.maps if name.startswith(start))
        return dataclasses.replace(self, maps=inside)


class AdaptedLinear(nnx.LoRALinear):
    """A linear map with an adapter, which changes no bit of what the map returns while B is zero."""

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map x [..., in] to [..., out]."""
        # Fused with what follows, the sum would make XLA round that otherwise than after the map alone.
        return jax.lax.optimization_barrier(super().__call__(x, out_sharding))


def add_adapters(module: nnx.Module, adapters: Adapters, rngs: nnx.Rngs) -> None:
    """Put adapters beside maps of a module; the maps' own weights stay as they are.

    Args:
      module: of which the maps are a part.
      adapters: which, by the names that the module knows.
      rngs: source of each A.
    """
    for name in adapters.maps:
        *path, last = name.split(".")
        parent: Any = module
        for part in path:
            parent = getattr(parent, part)
        plain: nnx.Linear = getattr(parent, last)
        adapted = AdaptedLinear(
            plain.in_features,
            plain.out_features,
            lora_rank=adapters.rank,
            lora_dtype=plain.dtype,
            use_bias=plain.use_bias,
            dtype=plain.dtype,
            rngs=rngs,
        )
        adapted.kernel, adapted.bias = plain.kernel, plain.bias
        setattr(parent, last, adapted)


def is_of_adapter(name: str) -> bool:
    """Whether a parameter, "blocks_0.mixer.query.lora.lora_a", is one of an adapter's two."""
    return name.endswith((_A, _B))


def adapted_map(name: str) -> str:
    """The map that one of an adapter's parameters stands beside."""
    return name.removesuffix(_A).removesuffix(_B)


def merged(parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters by name in which each adapted map is W + A B, and there are no adapters.

    Args:
      parameters: by names with dots; W [..., in, out], A [..., in, rank], B [..., rank, out].
    """
    found = {name: leaf for name, leaf in parameters.items() if not is_of_adapter(name)}
    for name, first in parameters.items():
        if name.endswith(_A):
            product = jnp.matmul(first, parameters[adapted_map(name) + _B], precision="highest")
            found[f"{adapted_map(name)}.kernel"] += product
    return found

"""One optimizer step as a pure function of state, batch and learning rate.

Shapes: A parts of a batch, B rows of a part, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from mc_jax.config import Remat
from mc_jax.parallel import constrain
from mc_jax.parallel.compiler import compiler_options
from mc_jax.parallel.cross_entropy import cross_entropy
from mc_jax.parallel.parameters import constrain_tree

type Parameters = dict[str, Any]
type Part = Callable[[Parameters], Parameters]
"""A function that picks some of the parameters, the ones that are trained."""
type Batch = Mapping[str, jax.typing.ArrayLike]
"""inputs, targets, document_ids: [rows, T] int32; loss_mask [rows, T] float32."""


class TrainState(NamedTuple):
    """All that a checkpoint must hold."""

    parameters: Parameters
    optimizer: Any
    step: jax.Array
    """Finished steps, int32."""


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """A model as its static part and nested dicts of arrays."""
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def by_name(parameters: Parameters) -> dict[str, Any]:
    """The arrays of parameters by names such as "blocks_0.mixer.query.kernel"."""
    named: Any = traverse_util.flatten_dict(parameters, sep=".")
    return named


def from_names(named: Mapping[str, Any]) -> Parameters:
    """The parameters that `by_name` took apart."""
    return traverse_util.unflatten_dict(dict(named), sep=".")


def merge_model(graph: nnx.GraphDef, parameters: Parameters) -> Any:
    """The model that `split_model` took apart, with these parameters."""
    return nnx.merge(graph, parameters)


def init_state(
    parameters: Parameters, optimizer: optax.GradientTransformation, part: Part | None = None
) -> TrainState:
    """The state before the first step; the optimizer's is of what is trained alone. `part` None: all is."""
    trained = parameters if part is None else part(parameters)
    return TrainState(parameters, optimizer.init(trained), jnp.zeros((), jnp.int32))


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number of a tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def token_losses(
    model: Any, batch: Batch, top_k: jax.Array | None = None, *, remat: Remat = "none"
) -> jax.Array:
    """Cross-entropy of each target in nats [rows, T], float32, 0 where the loss mask is.

    `top_k`, a traced scalar, takes the place of the model's while that is annealed; `remat` is what blocks
    save for their gradient. A masked token counts neither here nor in the gradient of the output map, though
    its loss be NaN; another one's is NaN where its target is outside the vocabulary.
    """
    x = model.features(batch["inputs"], batch["document_ids"], top_k, remat=remat)
    return losses_of_features(model, x, batch)


def losses_of_features(model: Any, x: jax.Array, batch: Batch) -> jax.Array:
    """What `token_losses` makes of the features x [rows, T, D] that the output map gets."""
    mask = jnp.asarray(batch["loss_mask"])
    losses = cross_entropy(x, model.output_map, jnp.asarray(batch["targets"]))
    # Selected, not multiplied: 0 times NaN is NaN.
    return jnp.where(mask != 0, losses * mask, 0)


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    remat: Remat = "none",
    part: Part | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step, compiled for the current mesh: (state, batch, learning rate, top_k=None) -> (state, metrics).

    Metrics are "loss" and "grad_norm". The loss is the mean over the whole batch's tokens in nats, whatever
    `accumulation` (the parts that a batch is cut into to save memory) and `remat` (what blocks save for their
    gradient). The state that is passed in is given up to the new one. With `part` the others are frozen: they
    have neither gradients nor an optimizer's state, and nothing below the lowest that is trained is gone back
    through.
    """

    def whole(parameters: Parameters, trained: Parameters) -> Parameters:
        return trained if part is None else from_names(by_name(parameters) | by_name(trained))

    def step(state: TrainState, batch: Batch, rate: jax.Array, top_k: jax.Array | None = None):
        tokens = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)

        trained = state.parameters if part is None else part(state.parameters)

        @jax.value_and_grad
        def value_and_grad(trained: Parameters, rows: Batch) -> jax.Array:
            model = merge_model(graph, whole(state.parameters, trained))
            return jnp.sum(token_losses(model, rows, top_k, remat=remat)) / tokens

        if accumulation == 1:
            loss, gradients = value_and_grad(trained, batch)
        else:
            # Every device's rows go to all parts.
            parts = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), batch
            )
            parts = jax.tree.map(lambda x: constrain(x, None, "batch", "tokens"), parts)

            def accumulate(total, rows):
                return jax.tree.map(jnp.add, total, value_and_grad(trained, rows)), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
            (loss, gradients), _ = jax.lax.scan(accumulate, zeros, parts)
        gradients = constrain_tree(gradients)
        # Adam's bias correction raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
        moved = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
        parameters = whole(state.parameters, moved)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        # Laid out as it came, so that it can take the old one's place.
        return constrain_tree(TrainState(parameters, optimizer_state, state.step + 1)), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())

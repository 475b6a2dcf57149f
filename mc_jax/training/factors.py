"""Factors of the learning rate for parts of the parameters."""

from collections.abc import Mapping
from typing import Any, cast

import optax

from mc_jax.training.patterns import matching
from mc_jax.training.step import Parameters, by_name, from_names


def with_factors(
    optimizer: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """The optimizer with its updates, weight decay included, times the factors of the parts they are for.

    Its state is as without factors, so they may change while a run goes on.

    Args:
      optimizer: what is wrapped; without factors it is returned as it is.
      factors: by pattern; a parameter that none matches has 1. `init` raises a ValueError where a pattern
        matches no parameter that is trained, or two match the same.
    """
    if not factors:
        return optimizer

    def init(params: Any) -> Any:
        _by_parameter(params, factors)
        return optimizer.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, state = optimizer.update(updates, state, params)
        return _scaled(cast("Parameters", moves), factors), state

    return optax.GradientTransformation(init, update)


def _scaled(moves: Parameters, factors: Mapping[str, float]) -> Parameters:
    chosen = _by_parameter(moves, factors)
    return from_names({name: move * chosen.get(name, 1.0) for name, move in by_name(moves).items()})


def _by_parameter(parameters: Parameters, factors: Mapping[str, float]) -> dict[str, float]:
    """The factor of each parameter that has one."""
    names, chosen, patterns = by_name(parameters), dict[str, float](), dict[str, str]()
    for pattern, factor in factors.items():
        option = "training.learning_rate_factors"
        for name in sorted(matching(names, [pattern], option, "no parameter that is trained")):
            if name in patterns:
                raise ValueError(
                    f"{option} {patterns[name]} and {pattern} both match {name}; make one of them narrower"
                )
            chosen[name], patterns[name] = factor, pattern
    return chosen

"""Parameters by patterns of their names, and the part of them that is trained."""

import fnmatch
from collections.abc import Iterable, Sequence

from mc_jax.config import TrainingConfig
from mc_jax.training.step import Parameters, Part, by_name, from_names


def matching(names: Iterable[str], patterns: Sequence[str], option: str, nothing: str) -> set[str]:
    """The names that one of some patterns matches.

    A pattern, with `*`, `?` and `[...]` as in a shell, is for a whole name or for some of its parts between
    dots: "router_query", "mixer.router_*" and "blocks_0" are all for "blocks_0.mixer.router_query.kernel".

    Raises:
      ValueError: a pattern matches none; the message begins with the option, and says `nothing`.
    """
    names, found = sorted(names), set()
    for pattern in patterns:
        forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        matched = {name for name in names if any(fnmatch.fnmatchcase(name, form) for form in forms)}
        if not matched:
            shown = f"; there are {', '.join(names)}" if len(names) < 5 and names else ""
            raise ValueError(f"{option} {pattern} matches {nothing}{shown}")
        found |= matched
    return found


def trained_part(settings: TrainingConfig) -> Part | None:
    """The function that picks the parameters that are trained; None: all are.

    It raises a ValueError where a pattern matches none, or nothing is left to train.
    """
    if settings.train is None and settings.freeze is None:
        return None

    def part(parameters: Parameters) -> Parameters:
        named = by_name(parameters)
        names = set(named)
        if settings.train is not None:
            names = matching(named, settings.train, "training.train", "no parameter of the model")
        if settings.freeze is not None:
            names -= matching(named, settings.freeze, "training.freeze", "no parameter of the model")
        if not names:
            raise ValueError("training.freeze leaves nothing to train; leave some parameter out of it")
        return from_names({name: named[name] for name in sorted(names)})

    return part

"""Parameters by patterns of their names, the part of them that is trained, and the maps with adapters."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from mc_jax.config import TrainingConfig
from mc_jax.nn.adapters import Adapters, is_of_adapter
from mc_jax.training.step import Parameters, Part, by_name, from_names

# Maps of one or a few numbers a head.
_NARROW = ("map", "online_logit")
_NO_PARAMETER = "no parameter of the model"


def is_wide_map(name: str) -> bool:
    """Whether a parameter, "blocks_0.mixer.query.kernel", is a block's map from many features to many."""
    first, *parts = name.split(".")
    return first.startswith("blocks_") and parts[-1] == "kernel" and parts[-2] not in _NARROW


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

    Beside adapters these are the ones that `train` names. It raises a ValueError where a pattern matches
    none, or nothing is left to train.
    """
    if settings.train is None and settings.freeze is None and settings.adapter_rank is None:
        return None

    def part(parameters: Parameters) -> Parameters:
        named = by_name(parameters)
        adapters = {name for name in named if is_of_adapter(name)}
        whole, frozen = _named_by(settings, named.keys() - adapters)
        names = (whole - frozen) | adapters
        if not names:
            raise ValueError("training.freeze leaves nothing to train; leave some parameter out of it")
        return from_names({name: named[name] for name in sorted(names)})

    return part


def chosen_adapters(settings: TrainingConfig, shapes: Mapping[str, Sequence[int]]) -> Adapters | None:
    """The maps that have adapters: all wide ones of the blocks but those that `train` or `freeze` names.

    Args:
      settings: the training's.
      shapes: of the model's parameters, by name, without adapters.

    Returns:
      None where the settings ask for none.

    Raises:
      ValueError: a pattern matches nothing, or nothing that would be trained; no map is left, or the rank is
        that of a whole map.
    """
    if settings.adapter_rank is None:
        return None
    wide = {name for name in shapes if is_wide_map(name)}
    whole, frozen = _named_by(settings, shapes)
    for pattern in settings.freeze or ():
        if not matching(shapes, [pattern], "training.freeze", _NO_PARAMETER) & (wide | whole):
            raise ValueError(
                f"training.freeze {pattern} has no effect beside training.adapter_rank: it matches neither a "
                "map that would have an adapter nor a parameter of training.train; leave it out"
            )
    maps = sorted(wide - whole - frozen)
    if not maps:
        raise ValueError("training.train and training.freeze leave no map an adapter; name fewer there")
    narrowest = min(maps, key=lambda name: min(shapes[name][-2:]))
    if settings.adapter_rank >= min(shapes[narrowest][-2:]):
        raise ValueError(
            f"training.adapter_rank {settings.adapter_rank} is no low rank for {narrowest} "
            f"{list(shapes[narrowest][-2:])}; set it below {min(shapes[narrowest][-2:])}"
        )
    return Adapters(rank=settings.adapter_rank, maps=tuple(name.removesuffix(".kernel") for name in maps))


def _named_by(settings: TrainingConfig, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """The parameters that are trained whole but for those that are frozen, and the frozen ones."""
    names = set(names)
    whole = names if settings.adapter_rank is None else set[str]()
    if settings.train is not None:
        whole = matching(names, settings.train, "training.train", _NO_PARAMETER)
    return whole, matching(names, settings.freeze or (), "training.freeze", _NO_PARAMETER)

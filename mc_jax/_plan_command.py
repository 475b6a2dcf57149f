"""The command `mc-jax plan`: it reads its arguments, checks them, and only then imports what is heavy."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from mc_jax._arguments import UsageError, parse
from mc_jax._recipes import describe_recipes, known_recipes, load_recipe
from mc_jax.config import Config, validate
from mc_jax.slices import EXAMPLES, read_slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Options of `mc-jax plan RECIPE`."""

    topology: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY [TOPOLOGY ...]")]
    """Chips, such as v5e:4x4, v5p:4x4x4, v5p-128, v6e-256 or h100:8; several are laid side by side."""
    slices: int = 1
    """Slices of that topology, joined by a network."""
    vocab_size: int | None = None
    """Ids of the tokenizer; none: those of the recipe's data, or 32,000 if these are not here."""
    search: tyro.conf.FlagCreatePairsOff[bool] = False
    """Look for the lightest recomputation, then the largest batch, that fit; each attempt compiles."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    """What would be trained, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Lay the plans of several recipes and topologies side by side."""

    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE@TOPOLOGY [...]")]
    """What to plan, such as quickstart@v5e:2x2."""
    slices: int = 1
    """Slices of each topology, joined by a network."""
    vocab_size: int | None = None
    """Ids of the tokenizer; none: those of each recipe's data, or 32,000 if these are not here."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""


def plan(arguments: Sequence[str]) -> None:
    """Tell whether a recipe fits chips that are not here, how fast it is, and what takes the time."""
    if "--compare" in arguments[:1]:
        _compare_plans(parse(CompareArguments, arguments, program="mc-jax plan"))
        return
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"}.isdisjoint(arguments):
            print(_plan_help())
            return
        raise UsageError(
            "which recipe? write mc-jax plan RECIPE --topology TOPOLOGY ..., or "
            f"mc-jax plan --compare RECIPE@TOPOLOGY ...; known are {', '.join(known_recipes())}"
        )
    name, description, config = load_recipe(arguments[0])
    chosen = parse(
        PlanArguments,
        arguments[1:],
        program=f"mc-jax plan {arguments[0]}",
        description=description,
        default=PlanArguments(topology=(), config=config),
    )
    if not chosen.topology:
        raise UsageError(f"which chips? give --topology, such as {EXAMPLES}")
    if chosen.search and (chosen.json or len(chosen.topology) > 1):
        raise UsageError("--search prints what it finds for one --topology; leave --json and the others out")
    for topology in chosen.topology:
        read_slice(topology)
    validate(chosen.config)
    if chosen.search:
        _search(chosen)
        return
    _print_plans(
        [(name, chosen.config, topology) for topology in chosen.topology],
        slices=chosen.slices,
        vocab_size=chosen.vocab_size,
        as_json=chosen.json,
    )


def _plan_help() -> str:
    return "\n".join(
        [
            "usage: mc-jax plan RECIPE --topology TOPOLOGY [TOPOLOGY ...] [--slices N] [--vocab-size N]",
            "                   [--search] [--json] [--SECTION.SETTING VALUE ...]",
            "       mc-jax plan --compare RECIPE@TOPOLOGY [RECIPE@TOPOLOGY ...] [--slices N]",
            "                   [--vocab-size N] [--json]",
            "",
            "Tell whether a recipe fits chips that are not here, how fast it is, and what takes the time.",
            f"A TOPOLOGY is such as {EXAMPLES}. The very training",
            "step is compiled; of GPUs, memory and FLOPs are told by formula. A RECIPE is one of",
            describe_recipes(),
            "or the path of a Python file with a function config(). mc-jax plan RECIPE --help tells all.",
        ]
    )


def _compare_plans(chosen: CompareArguments) -> None:
    wanted = []
    for one in chosen.compare:
        recipe, at, topology = one.rpartition("@")
        if not at:
            raise UsageError(f"{one!r} has no topology; write RECIPE@TOPOLOGY, such as quickstart@v5e:2x2")
        read_slice(topology)
        name, _, config = load_recipe(recipe)
        wanted.append((name, validate(config), topology))
    if not wanted:
        raise UsageError("there is nothing to compare; write --compare RECIPE@TOPOLOGY RECIPE@TOPOLOGY ...")
    _print_plans(wanted, slices=chosen.slices, vocab_size=chosen.vocab_size, as_json=chosen.json)


def _print_plans(
    wanted: Sequence[tuple[str, Config, str]], *, slices: int, vocab_size: int | None, as_json: bool
) -> None:
    from mc_jax.planning.topology import read_topology

    titles = [f"{name} on {read_topology(topology, slices).title}" for name, _, topology in wanted]

    from mc_jax.planning import plan as make_plan
    from mc_jax.planning.show import compare, print_json, show
    from mc_jax.planning.verdict import verdict_of

    plans = []
    for title, (_, config, topology) in zip(titles, wanted, strict=True):
        made = make_plan(config, topology=topology, slices=slices, vocab_size=vocab_size)
        plans.append((title, made, verdict_of(made, config)))
    if as_json:
        print_json(plans)
    elif len(plans) > 1:
        compare(plans)
    else:
        title, made, verdict = plans[0]
        show(made, verdict, title)


def _search(chosen: PlanArguments) -> None:
    from mc_jax.planning.search import search
    from mc_jax.planning.show import show_attempt, show_found

    found = search(
        chosen.config,
        topology=chosen.topology[0],
        slices=chosen.slices,
        vocab_size=chosen.vocab_size,
        tell=show_attempt,
    )
    show_found(found)

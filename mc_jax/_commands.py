"""The commands of `mc-jax`: each reads its arguments, checks them, and only then imports what is heavy."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mc_jax._arguments import UsageError, parse
from mc_jax._recipes import describe_recipes, load_recipe, recipe_files
from mc_jax.config import Config, validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesArguments:
    """The processes that train together, each on its machine; TPU pods, Slurm and MPI need none of these."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 is, and a port that is free there; None: as the environment tells."""
    count: int | None = None
    """Their number; 1 keeps this one alone, whatever the environment tells."""
    index: int | None = None
    """Which of them this is, from 0."""
    patience: float = 300.0
    """Seconds within which all must have started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Options of `mc-jax train`."""

    name: str | None = None
    """Name of the run; None: the recipe's."""
    runs_dir: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "runs"
    """Folder of all runs; this one is written to RUNS-DIR/NAME."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete an earlier run of that name instead of resuming it."""
    processes: ProcessesArguments = ProcessesArguments()
    config: Annotated[Config, tyro.conf.arg(name="")]
    """What is trained, and how."""


def train(arguments: Sequence[str]) -> None:
    """Pretrain a model by a recipe, or resume the run of that name."""
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"}.isdisjoint(arguments):
            defaults = TrainArguments(config=Config())
            program = "mc-jax train RECIPE"
            parse(TrainArguments, ["--help"], program=program, description=_train_help(), default=defaults)
        raise UsageError(
            f"which recipe? write mc-jax train RECIPE ...; known are {', '.join(recipe_files())}"
        )
    name, description, config = load_recipe(arguments[0])
    chosen = parse(
        TrainArguments,
        arguments[1:],
        program=f"mc-jax train {arguments[0]}",
        description=description,
        default=TrainArguments(config=config),
    )
    validate(chosen.config)
    name = name if chosen.name is None else chosen.name
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"--name {name!r} is no folder's name; the folder above it is --runs-dir")

    import jax
    from etils import epath

    from mc_jax.evaluation.summary import summarize_run
    from mc_jax.parallel.processes import joined
    from mc_jax.training.loop import train as run_training

    run_dir = epath.Path(chosen.runs_dir) / name
    with joined(**dataclasses.asdict(chosen.processes)):
        step = run_training(chosen.config, run_dir, overwrite=chosen.overwrite)
        is_done = step == chosen.config.training.steps
        result = summarize_run(run_dir) if is_done else None
        if jax.process_index() > 0:
            return
        if result is not None:
            _print_result(str(run_dir), result)
        if is_done:
            print(f"report: {run_dir / 'report.html'}")
        else:
            print(f"stopped by SIGTERM, step {step} is saved; the same command goes on from there")


def _train_help() -> str:
    return "\n".join(
        [
            "Pretrain a model by a recipe, or resume the run of that name.",
            "",
            "RECIPE is a name below, or the path of a Python file with a function config():",
            describe_recipes(),
            "",
            "Defaults shown here are the framework's; mc-jax train RECIPE --help shows a recipe's.",
        ]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure a run's perplexity on the held-out text of its corpus."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder that mc-jax train wrote, for example runs/quickstart."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of a table."""


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a run's perplexity on the held-out text of its corpus."""
    chosen = parse(EvalArguments, arguments, program="mc-jax eval")
    _must_be_run(chosen.run)

    from mc_jax.evaluation.perplexity import evaluate_run

    result = evaluate_run(chosen.run)
    if chosen.json:
        print(json.dumps(result))
    else:
        _print_result(chosen.run, result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Print a prompt and how a run's model goes on from it."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder that mc-jax train wrote, for example runs/quickstart."""
    prompt: str
    """Text to go on from."""
    tokens: int = 200
    """Length of the continuation, in tokens."""
    temperature: float = 0.8
    """Spread of the sampling; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Probability mass that tokens are drawn from; 1 is all of them."""
    seed: int = 0
    """Seeds the sampling."""
    max_cached: int | None = None
    """Places for cached memories in each layer; none: one for each segment."""
    when_full: Literal["error", "drop-oldest"] = "error"
    """When all places are taken: stop, or forget the oldest memory."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Numbers that cached memories are kept as; none: as computed."""
    place: Literal["device", "host"] = "device"
    """Memory that cached memories lie in; host is for sparse reads."""


def generate(arguments: Sequence[str]) -> None:
    """Print a prompt and how a run's model goes on from it."""
    chosen = parse(GenerateArguments, arguments, program="mc-jax generate")
    _must_be_run(chosen.run)

    from mc_jax.caching import Storage
    from mc_jax.inference.generate import generate_run

    storage = Storage(
        max_cached=chosen.max_cached,
        when_full=chosen.when_full,
        state_dtype=chosen.state_dtype,
        place=chosen.place,
    )
    continuation = generate_run(
        chosen.run,
        chosen.prompt,
        tokens=chosen.tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=chosen.seed,
        storage=storage,
    )
    print(chosen.prompt + continuation)


def _must_be_run(folder: str) -> None:
    from etils import epath

    if not (epath.Path(folder) / "config.json").is_file():
        raise UsageError(
            f"there is no run in {folder} (no config.json); give the folder that mc-jax train wrote, "
            "for example runs/quickstart"
        )


def _print_result(run: str, result: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("on held-out text", run)
    for name, value in result.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Tokenize text, jsonl or parquet files into a token store."""

    inputs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="INPUT [INPUT ...]", help_behavior_hint="(required)"),
    ]
    """Training text: .txt (a document a file), .jsonl (a line), both also with .gz, .parquet (a row)."""
    output: Path
    """Folder to be made, for --data.corpus of mc-jax train; it is there whole or not at all."""
    held_out: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    """Files to be scored, not trained on."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the inputs), "bytes", or a tokenizer.json that mc-jax wrote."""
    vocab_size: int | None = None
    """Ids of the "bpe" tokenizer, for example 4096; None with another."""
    text_field: str = "text"
    """Field of .jsonl, or column of .parquet, that has the text."""


def prepare(arguments: Sequence[str]) -> None:
    """Tokenize text, jsonl or parquet files into a token store."""
    chosen = parse(PrepareArguments, arguments, program="mc-jax prepare")
    if not chosen.inputs:
        raise UsageError("no input is named; write mc-jax prepare FILE ... --output FOLDER")

    from mc_jax.data.prepare import prepare as write_store

    dataset = write_store(
        chosen.inputs,
        chosen.output,
        held_out=chosen.held_out,
        tokenizer=chosen.tokenizer,
        vocab_size=chosen.vocab_size,
        text_field=chosen.text_field,
    )
    for name, store in (("training", dataset.train), ("held-out", dataset.held_out)):
        if store is not None:
            print(f"{name}: {len(store):,} documents, {store.num_bytes:,} bytes, {store.num_tokens:,} tokens")
    print(
        f"train on it: mc-jax train RECIPE --data.corpus {shlex.quote(str(chosen.output))} "
        "--data.tokenizer None --data.vocab-size None"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestArguments:
    """Compare every kernel with its plain reference on this machine's device."""


def selftest(arguments: Sequence[str]) -> None:
    """Compare every kernel with its plain reference on this machine's device."""
    parse(SelftestArguments, arguments, program="mc-jax selftest")

    from mc_jax._selftest import selftest as run

    if not run():
        raise SystemExit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Options of `mc-jax plan RECIPE`."""

    topology: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY [TOPOLOGY ...]")]
    """Chips, such as v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2 or h100:8; several are laid side by side."""
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
            f"mc-jax plan --compare RECIPE@TOPOLOGY ...; known are {', '.join(recipe_files())}"
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
        raise UsageError("which chips? give --topology, such as v5e:4x4, v5p:4x4x4, tpu7x:2x2x2 or h100:8")
    if chosen.search and (chosen.json or len(chosen.topology) > 1):
        raise UsageError("--search prints what it finds for one --topology; leave --json and the others out")
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
            "A TOPOLOGY is such as v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x2 or h100:8. The very training",
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
        name, _, config = load_recipe(recipe)
        wanted.append((name, validate(config), topology))
    _print_plans(wanted, slices=chosen.slices, vocab_size=chosen.vocab_size, as_json=chosen.json)


def _print_plans(
    wanted: Sequence[tuple[str, Config, str]], *, slices: int, vocab_size: int | None, as_json: bool
) -> None:
    from mc_jax.planning import plan as make_plan
    from mc_jax.planning.show import compare, print_json, show
    from mc_jax.planning.topology import read_topology

    titles = [f"{name} on {read_topology(topology, slices).title}" for name, _, topology in wanted]
    plans = [
        (title, make_plan(config, topology=topology, slices=slices, vocab_size=vocab_size))
        for title, (_, config, topology) in zip(titles, wanted, strict=True)
    ]
    if as_json:
        print_json(plans)
    elif len(plans) > 1:
        compare(plans)
    else:
        show(plans[0][1], plans[0][0])


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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "selftest": selftest,
}

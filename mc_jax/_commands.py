"""The commands of `mc-jax`: each reads its arguments, checks them, and only then imports what is heavy."""

import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse
from mc_jax._checkpoints_command import checkpoints
from mc_jax._compare_command import compare
from mc_jax._eval_command import evaluate, shown
from mc_jax._export_command import export
from mc_jax._plan_command import plan
from mc_jax._prepare_command import prepare
from mc_jax._recipes import describe_recipes, known_recipes, load_recipe
from mc_jax._sweep_command import sweep
from mc_jax.config import Config, validate
from mc_jax.stop_signals import current


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesArguments:
    """The processes that train together, each on its machine; TPU pods, Slurm and MPI need none of these."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Process 0's machine, and a port that is free there; None: as the environment tells."""
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
    init: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Begin with the weights of another run: its folder, or RUN/checkpoints/STEP. The model is that run's,
    whatever the recipe's, but for --model options here. A run that has a checkpoint of its own resumes."""
    init_state: Literal["weights", "full"] = "weights"
    """With --init: weights alone, or the optimizer's state too."""
    init_new: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """With --init: parameters that the checkpoint may lack, and that are drawn, for example router_query."""
    init_drop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """With --init: parameters of the checkpoint that are left out."""
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
            f"which recipe? write mc-jax train RECIPE ...; known are {', '.join(known_recipes())}"
        )
    name, description, config = load_recipe(arguments[0])

    def read(defaults: Config) -> TrainArguments:
        return parse(
            TrainArguments,
            arguments[1:],
            program=f"mc-jax train {arguments[0]}",
            description=description,
            default=TrainArguments(config=defaults),
        )

    chosen = read(config)
    name = name if chosen.name is None else chosen.name
    if Path(name).name != name or name in ("", ".."):
        raise UsageError(f"--name {name!r} is no folder's name; the folder above it is --runs-dir")
    if chosen.init is None:
        for option in ("init_state", "init_new", "init_drop"):
            if getattr(chosen, option) != getattr(TrainArguments, option, ()):
                raise UsageError(f"--{option.replace('_', '-')} has no effect without --init; leave it out")
    else:
        chosen = read(_config_for(chosen, config, name))
    validate(chosen.config)

    signals = current()
    signals.codes[signal.SIGTERM] = 0  # docs/laptop-to-pod.md: launchers make it 143
    signals.words = "stopped by {signal} before a step was done; the same command goes on"

    import jax
    from etils import epath

    from mc_jax.evaluation.summary import summarize_run
    from mc_jax.parallel.processes import first_says, joined
    from mc_jax.training.loop import train as run_training

    run_dir = epath.Path(chosen.runs_dir) / name
    with joined(**dataclasses.asdict(chosen.processes)):
        step = run_training(chosen.config, run_dir, overwrite=chosen.overwrite, init=_init_of(chosen))
        is_done = step == chosen.config.training.steps
        rest = "goes on with the evaluation" if is_done else "goes on from there"
        stopped = f"stopped by {{signal}}, step {step} is saved; the same command {rest}"
        if jax.process_index() == 0:  # which ends the others
            signals.end_at_once(stopped)
        is_stopped = not is_done or first_says(signals.heard is not None)
        result = None if is_stopped else summarize_run(run_dir)
        if jax.process_index() > 0:
            return
        if result is not None:
            _print_result(str(run_dir), result)
        if is_stopped:
            print(stopped.format(signal=signals.name))
        else:
            print(f"report: {run_dir / 'report.html'}")


def _init_of(chosen: TrainArguments) -> Any:
    """What a run is to begin with; None: weights that are drawn."""
    if chosen.init is None:
        return None

    from mc_jax.training.initial import Init

    return Init(path=chosen.init, state=chosen.init_state, new=chosen.init_new, drop=chosen.init_drop)


def _config_for(chosen: TrainArguments, config: Config, name: str) -> Config:
    """The recipe's settings with those of the run whose weights are taken.

    A run that goes on needs that one no more, so its own `init.json` tells them.
    """
    from etils import epath

    from mc_jax.training.initial import settings_of

    assert chosen.init is not None
    there = settings_of(chosen.init, None if chosen.overwrite else epath.Path(chosen.runs_dir) / name)
    return there.in_place(config, chosen.config.data.corpus)


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
    must_be_run(chosen.run)

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


def _print_result(run: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("on held-out text", run)
    for name in result:
        if not name.endswith("_standard_error"):
            table.add_row(name.replace("_", " "), shown(result, name))
    Console().print(table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestArguments:
    """Compare every kernel with its plain reference on this machine's device."""


def selftest(arguments: Sequence[str]) -> None:
    """Compare every kernel with its plain reference on this machine's device."""
    parse(SelftestArguments, arguments, program="mc-jax selftest")

    from mc_jax._selftest import selftest as run

    if not run():
        raise SystemExit(1)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": prepare,
    "plan": plan,
    "train": train,
    "eval": evaluate,
    "sweep": sweep,
    "generate": generate,
    "compare": compare,
    "checkpoints": checkpoints,
    "export": export,
    "selftest": selftest,
}

ELSEWHERE = {"tasks": "mc-jax eval RUN --tasks TASK ..."}
"""What somebody may type as a command, and what does it."""

"""Many short trainings and a sweep of them all, by one command that goes on where it was stopped.

    python -m experiments.study caches

STUDY is a module of `experiments/studies`, or the path of a Python file, with a function `study()`. Each
variant is trained with each seed by `mc-jax train`, then `mc-jax sweep` reads all runs. RUNS-DIR/STUDY has
the runs, the dial, and the table: study.md, study.csv. What is done is not done again. The same command
started twice divides the work. A training that fails does not stop the others, and is told at the end.
"""

import contextlib
import dataclasses
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import tyro

from experiments import studies
from experiments._study_table import RESULTS, write_table
from experiments.studies import Study, Training
from mc_jax._arguments import UsageError, did_you_mean, parse
from mc_jax._recipes import run_module
from mc_jax.evaluation.sweep.claim import claimed

_SECONDS_BETWEEN_LOOKS = 1.0

type Call = Callable[[Sequence[str]], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train each variant of a study with each seed, read all runs, and write the table."""

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY")]
    """Name of a module in experiments/studies, or path of a Python file with a function study()."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """What each variant is trained with."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Folder of the study's folder."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the commands, and run none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; 2 if some of it failed."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        chosen = parse(StudyArguments, given, program="python -m experiments.study")
        name, study = load_study(chosen.study)
        if not chosen.seeds or len(set(chosen.seeds)) < len(chosen.seeds):
            raise UsageError("--seeds names none, or one twice; name each once")
        folder = chosen.runs_dir / name
        trainings = trainings_of(study, chosen.seeds, folder)
        done = [one for one in trainings if one.is_done]
        if not chosen.dry_run:
            with _passing_on_sigterm():
                command = shlex.join(["python", "-m", "experiments.study", *given])
                return run_study(study, trainings, folder, command=command)
    except UsageError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    for one in trainings:
        print(f"{shlex.join(one.words)}{'  # done' if one in done else ''}")
    print(shlex.join(_sweep(study, trainings, folder)))
    return 0


def load_study(name: str) -> tuple[str, Study]:
    """A study's name, and what it is.

    Raises:
      UsageError: there is none of this name, or it cannot be read.
    """
    path = Path(name)
    if path.suffix != ".py":
        known = sorted(file.stem for file in Path(studies.__file__).parent.glob("[!_]*.py"))
        if name not in known:
            raise UsageError(
                f"there is no study {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}; "
                "or give the path of a Python file with a function study()"
            )
        path = Path(studies.__file__).parent / f"{name}.py"
    elif not path.is_file():
        raise UsageError(f"there is no file {name}; give a study's name or the path of its Python file")
    _, found = run_module(path, "study")
    if not isinstance(found, Study) or not found.variants:
        raise UsageError(f"study() of {path} returns {found!r}; let it return a Study with variants")
    return path.stem, found


def trainings_of(study: Study, seeds: Sequence[int], folder: Path) -> list[Training]:
    """All trainings of a study, in the order in which they are begun: a seed of each variant first."""
    found = []
    for seed in seeds:
        for variant, options in study.variants.items():
            base = study.begins_with.get(variant)
            needs = None if base is None else folder / f"{base}-{seed}"
            words = [
                "mc-jax",
                "train",
                study.recipe,
                "--runs-dir",
                str(folder),
                "--name",
                f"{variant}-{seed}",
            ]
            words += [] if needs is None else ["--init", str(needs)]
            words += ["--training.seed", str(seed), *study.common, *options]
            found.append(
                Training(
                    variant=variant,
                    seed=seed,
                    folder=folder / f"{variant}-{seed}",
                    words=tuple(words),
                    needs=needs,
                )
            )
    return found


def run_study(
    study: Study, trainings: Sequence[Training], folder: Path, *, command: str, call: Call | None = None
) -> int:
    """Train what is not trained, sweep what is, and write the table.

    Args:
      study: what is compared.
      trainings: of `trainings_of`.
      folder: the study's.
      command: what runs all of it.
      call: runs a command of `mc-jax` and returns its exit code; None: in a process of its own.

    Returns:
      The exit code: 2 if a training or the sweep failed.
    """
    call = _in_a_process if call is None else call
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[Training] = []
    pending = list(trainings)
    while pending:
        busy: list[Training] = []
        for one in pending:
            if not one.is_possible:
                # Another process may be training what it needs; what has failed is waited for no more.
                waits = any(other.folder == one.needs for other in busy)
                (busy if waits else failed).append(one)
                continue
            with claimed(folder / f"{one.folder.name}.claim") as is_ours:
                if not is_ours:
                    busy.append(one)
                elif not one.is_done:
                    print(f"study: {shlex.join(one.words)}", flush=True)
                    if call(one.words) or not one.is_done:
                        failed.append(one)
        if len(busy) == len(pending):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        pending = busy
    done = [one for one in trainings if one.is_done]
    if not done:
        print(f"study: none of the {len(trainings)} trainings has a result", file=sys.stderr)
        return 2
    words = _sweep(study, done, folder)
    print(f"study: {shlex.join(words)}", flush=True)
    before = _written(folder)
    code = call(words)
    if _written(folder) != before:  # a sweep that was refused leaves an earlier one's results
        table = write_table(list(study.variants), done, folder, command=command)
        print(f"table: {table}")
    for one in failed:
        print(
            f"study: {one.variant} with seed {one.seed} has no result; the same command tries again",
            file=sys.stderr,
        )
    return 2 if failed or code else 0


def _written(folder: Path) -> int | None:
    """When the dial's results were written; None: they are not there."""
    file = folder / RESULTS
    return file.stat().st_mtime_ns if file.exists() else None


def _sweep(study: Study, trainings: Sequence[Training], folder: Path) -> tuple[str, ...]:
    runs = (str(one.folder) for one in trainings)
    return ("mc-jax", "sweep", *runs, *study.sweep, "--output", str(folder / "dial"))


def _in_a_process(words: Sequence[str]) -> int:
    # A process a training: what one compiles, or how it fails, is nothing to the next.
    program = Path(sys.executable).with_name(words[0])
    with subprocess.Popen([program, *words[1:]]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


@contextlib.contextmanager
def _passing_on_sigterm() -> Generator[None]:
    """Let SIGTERM end the command that is run too, which saves its state."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())

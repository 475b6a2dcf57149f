"""The options of `mc-jax eval`, and which of them another one makes void."""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mc_jax._arguments import UsageError
from mc_jax.config import AggregationName, Segmentation
from mc_jax.data.sources import has_fields
from mc_jax.evaluation.harness.settings import PREFIX, HarnessSettings
from mc_jax.evaluation.recall import RecallSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDial:
    """How the memories are read; what is None stays as it was trained."""

    segment_length: int | None = None
    """Tokens after which the memory's state is cached."""
    aggregation: AggregationName | None = None
    """How the online and the cached memories are read together; "none" turns the caches off."""
    top_k: int | None = None
    """Cached memories that "sparse", "average" and "null" read."""
    segmentation: Segmentation | None = None
    """Every segment is a memory, or a token's segments are grouped by the digits of their number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDial:
    """What is read; what is None stays as it was trained."""

    context_length: int | None = None
    """Tokens in a window."""
    corpus: str | None = None
    """A folder of mc-jax prepare with the run's tokenizer, whose held-out part is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationDial:
    """How windows are laid; what is None stays as the run's config has it."""

    stride: int | None = None
    """Tokens scored per window of a long document by --mode windows; None: as configured, or half one."""
    batch_size: int | None = None
    """Windows, or samples of a task, evaluated together; no result depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure runs on text, by default the held-out text of their corpus, or in tasks."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Folders that mc-jax train wrote, for example runs/quickstart; others are compared with the first."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""
    mode: Literal["windows", "last-k", "by-position", "stream"] | None = None
    """Score all tokens in overlapping windows (None: so), the last of each, by position, or in a stream."""
    last_k: int | None = None
    """Tokens that a window of --mode last-k scores; None: half of it."""
    first: int | None = None
    """First target of a document that --mode last-k scores: the longest window less last-k, if several
    lengths are to score the same tokens; None: this window less last-k."""
    max_cached: int | None = None
    """Places for cached memories in each layer, with --mode stream; None: one for each segment."""
    when_full: Literal["error", "drop-oldest"] = "error"
    """When all places are taken, with --mode stream: stop, or forget the oldest memory."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Numbers that cached memories are kept as, with --mode stream; None: as computed."""
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Text to be read instead: files, folders and patterns, as mc-jax prepare takes them."""
    text_field: str = "text"
    """Field of JSON, or column of .parquet, that has the text; a.b is field b of field a."""
    tasks: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TASK ...")] = None
    """Ask tasks instead, by their names in docs/tasks.md, or "all"; or lm-eval's, as lm_eval:NAME, or
    lm_eval:PATH.yaml."""
    inspect_router: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Tell instead what each token of this text file reads of the cached memories; - is standard input."""
    needle: str | None = None
    """A part of that text, which occurs in it once: how its last tokens find the segment that it is in."""
    asked_tokens: int | None = None
    """Tokens at that text's end whose reading counts for the needle; None: the last one."""
    recall: RecallSettings = RecallSettings()  # noqa: RUF009 - frozen
    """How tasks are asked, with --tasks."""
    lm_eval: HarnessSettings = HarnessSettings()  # noqa: RUF009 - frozen
    """How tasks of lm-eval are asked, with --tasks lm_eval:NAME."""
    model: ModelDial = ModelDial()
    data: DataDial = DataDial()
    evaluation: EvaluationDial = EvaluationDial()
    output: Path | None = None
    """Folder for RUN.MODE.json, all that was found and how, made if missing; with --tasks, a new one for
    tasks.html, results.json and samples.jsonl, or lm-eval's results.json and samples_TASK.jsonl; with
    --inspect-router, for RUN.router.html and .json."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of tables."""


_OF_TEXT = (
    *("mode", "last_k", "first", "max_cached", "when_full", "state_dtype", "text", "text_field"),
    *("data.corpus", "data.context_length", "evaluation.stride"),
)
_OF_TASKS = tuple(f"recall.{field.name}" for field in dataclasses.fields(RecallSettings))
_OF_LM_EVAL = tuple(f"lm_eval.{field.name}" for field in dataclasses.fields(HarnessSettings))
_OF_ROUTER = ("needle", "asked_tokens")
_STORAGE = ("max_cached", "when_full", "state_dtype")


def must_have_effect(chosen: EvalArguments) -> None:
    """See that no option is given that another one makes void.

    Raises:
      UsageError: one is.
    """
    if chosen.inspect_router is None:
        _refuse(chosen, _OF_ROUTER, "without --inspect-router; leave it out, or name a text file")
    if chosen.tasks is None:
        _refuse(chosen, _OF_TASKS, "without --tasks; leave it out, or name tasks")
    if not of_lm_eval(chosen.tasks or ()):
        _refuse(chosen, _OF_LM_EVAL, f"without --tasks {PREFIX}NAME; leave it out, or name such a task")
    if chosen.inspect_router is not None:
        _refuse(chosen, ("tasks", *_OF_TEXT, "evaluation.batch_size"), "with --inspect-router; leave it out")
        if chosen.needle is None:
            _refuse(chosen, ["asked_tokens"], "without --needle; leave it out")
    elif of_lm_eval(chosen.tasks or ()):
        if chosen.evaluation.stride is not None:
            raise UsageError("--evaluation.stride has no effect on tasks of lm-eval; set --lm-eval.stride")
        _refuse(chosen, _OF_TASKS, "on tasks of lm-eval; leave it out")
        _refuse(
            chosen, [name for name in _OF_TEXT if name != "data.context_length"], "with --tasks; leave it out"
        )
    elif chosen.tasks is not None:
        if chosen.data.context_length is not None:
            raise UsageError("--data.context-length has no effect with --tasks; set --recall.length")
        _refuse(chosen, _OF_TEXT, "with --tasks; leave it out")
    else:
        _must_have_effect_on_text(chosen)


def _must_have_effect_on_text(chosen: EvalArguments) -> None:
    mode = mode_name(chosen)
    if chosen.text:
        _refuse(chosen, ["data.corpus"], "with --text, which is read instead; leave one of them out")
    if not any(map(has_fields, chosen.text)):
        _refuse(chosen, ["text_field"], "without a --text that has fields; leave it out")
    if mode != "windows":
        _refuse(chosen, ["evaluation.stride"], f"with --mode {mode}; leave it out")
    if mode == "stream":
        _refuse(chosen, ["data.context_length"], "with --mode stream, which has no windows; leave it out")
    else:
        _refuse(chosen, _STORAGE, f"with --mode {mode}; set --mode stream")
    if mode != "last-k":
        _refuse(chosen, ["last_k", "first"], f"with --mode {mode}; set --mode last-k")


def _refuse(chosen: EvalArguments, names: Iterable[str], why: str) -> None:
    """Raise UsageError at the first of these options that has another value than its default."""
    for name in names:
        value = operator.attrgetter(name)
        if value(chosen) != value(EvalArguments):
            raise UsageError(f"--{name.replace('_', '-')} has no effect {why}")


def of_lm_eval(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks as lm-eval has them, if they are its; empty: none is.

    Raises:
      UsageError: some are, and some are not.
    """
    names = tuple(task.removeprefix(PREFIX) for task in tasks if task.startswith(PREFIX))
    if names and len(names) < len(tasks):
        raise UsageError(f"--tasks are {' '.join(tasks)}; ask those of lm-eval by themselves")
    return names


def mode_name(chosen: EvalArguments) -> str:
    """How a text is read."""
    return "windows" if chosen.mode is None else chosen.mode


def changes(chosen: EvalArguments) -> dict[str, Any]:
    """The settings that are to be others than the run's, by their names."""
    given = {
        f"{section}.{field.name}": getattr(getattr(chosen, section), field.name)
        for section in ("model", "data", "evaluation")
        for field in dataclasses.fields(getattr(chosen, section))
    }
    return {name: value for name, value in given.items() if value is not None and name != "data.corpus"}

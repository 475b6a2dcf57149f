"""Tasks run on a model: samples drawn and judged."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mc_jax.evaluation.origin import origin_of
from mc_jax.evaluation.recall import RecallSettings
from mc_jax.evaluation.tasks import TASKS
from mc_jax.evaluation.tasks.results import Recalled, TaskResult, cells_of
from mc_jax.evaluation.tasks.sample import (
    Ask,
    RowSample,
    Sample,
    Task,
    TextSample,
    TextTask,
    TooShort,
    sha256,
)
from mc_jax.evaluation.tasks.scoring import Judge, generations, likelihoods, recalls, router_hits
from mc_jax.training.run import Run

_SILENT: Callable[[str], None] = lambda _: None  # noqa: E731


def recall(
    run: Run, names: Sequence[str], settings: RecallSettings, *, told: Callable[[str], None] = _SILENT
) -> Recalled:
    """Ask a run's model tasks.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      names: of tasks.
      settings: how they are asked.
      told: hears a line on each task and length that is done.

    Raises:
      ValueError: as `run_task`.
    """
    return Recalled(
        origin=origin_of(run),
        tasks=tuple(run_task(run, name, settings, told=told) for name in names),
    )


def run_task(
    run: Run, name: str, settings: RecallSettings, *, told: Callable[[str], None] = _SILENT
) -> TaskResult:
    """Ask a run's model the samples of a task, `evaluation.batch_size` of them together.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      name: in `TASKS`.
      settings: lengths, samples.
      told: hears a line on each length that is done.

    Raises:
      ValueError: settings out of range or without effect, a length that is too short, or a model whose
        predictions are not finite.
    """
    check_asked(name, settings)
    if not settings.length:
        trained = run.trained or run.config
        settings = dataclasses.replace(settings, length=(trained.data.context_length,))
    task, tokenizer = TASKS[name], run.dataset.tokenizer
    judge = Judge(model=run.model, tokenizer=tokenizer, batch_size=run.config.evaluation.batch_size)
    asks = {
        length: [
            Ask(
                tokenizer=tokenizer,
                length=length,
                index=index,
                seed=settings.seed,
                alternatives=settings.alternatives,
                documents=settings.documents,
            )
            for index in range(settings.samples)
        ]
        for length in settings.length
    }
    # All are drawn before the first is read: a length that is too short is refused at once.
    drawn = {length: _drawn(task, group) for length, group in asks.items()}
    lines: list[dict[str, Any]] = []
    for length, samples in drawn.items():
        if isinstance(task, TextTask):
            texts = [sample for sample in samples if isinstance(sample, TextSample)]
            lines += _text_lines(judge, task, texts, length, generate=settings.generate)
        else:
            rows = [sample for sample in samples if isinstance(sample, RowSample)]
            lines += _row_lines(judge, task.name, rows, length)
        told(f"{task.name}: {len(samples)} samples of {length:,} tokens are done")
    return TaskResult(
        task=name,
        settings=settings,
        metric=task.metric if isinstance(task, TextTask) else "share of the places",
        cells=cells_of(lines),
        samples=tuple(lines),
        prompts_sha256=sha256("".join(line["prompt_sha256"] for line in lines)),
    )


def _drawn(task: Task, asks: Sequence[Ask]) -> list[Sample]:
    """All samples of a length.

    Raises:
      TooShort: some have no room; it names what the longest of them needs.
    """
    found, needed = [], []
    for ask in asks:
        try:
            found.append(task.draw(ask))
        except TooShort as error:
            needed.append(error.needed)
    if needed:
        raise TooShort(asks[0].length, max(needed))
    return found


def check_asked(name: str, settings: RecallSettings) -> None:
    """See that a task can be asked in this way.

    Raises:
      ValueError: an unknown task, a number out of range, or a setting without effect.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; known are {', '.join(TASKS)}")
    for field, least in (("samples", 1), ("seed", 0), ("alternatives", 0)):
        if getattr(settings, field) < least:
            raise ValueError(f"recall.{field} is {getattr(settings, field)}; set it to {least} or more")
    lengths = settings.length
    if lengths and (min(lengths) < 1 or len(set(lengths)) < len(lengths)):
        told = " ".join(map(str, lengths))
        raise ValueError(f"recall.length is {told}; give lengths of 1 token or more, each once")
    task = TASKS[name]
    if settings.documents is not None:
        if not (isinstance(task, TextTask) and task.reads_documents):
            raise ValueError(f"recall.documents has no effect on the task {task.name}; leave it out")
        if not settings.documents.is_file():
            raise ValueError(f"there is no file {settings.documents}; give a JSONL file of documents")


def must_have_effect(names: Sequence[str], settings: RecallSettings) -> None:
    """See that no setting of tasks of text is given where there are none.

    Raises:
      ValueError: one is.
    """
    if any(isinstance(TASKS[name], TextTask) for name in names):
        return
    for field in ("alternatives", "generate"):
        if getattr(settings, field) != getattr(RecallSettings, field):
            raise ValueError(
                f"recall.{field} has no effect on {', '.join(names)}: rows of tokens are read at places "
                "alone; leave it out"
            )


def _text_lines(
    judge: Judge, task: TextTask, samples: list[TextSample], length: int, *, generate: bool
) -> list[dict[str, Any]]:
    likely = likelihoods(judge, samples, length - 1)
    said = generations(judge, task, samples) if generate else [None] * len(samples)
    hits = router_hits(judge, samples, length - 1)
    return [
        {
            **_common(task.name, index, length, sample),
            "depth": sample.depth,
            "prompt": sample.prompt,
            "answers": list(sample.answers),
            "alternatives": list(sample.alternatives),
            "prompt_sha256": sha256(sample.prompt),
            **({} if generated is None else {"generated": generated[0].text}),
            "scores": {
                **({} if generated is None else {task.metric: generated[1]}),
                "ranked first": float(likelihood.rank == 1),
                "greedy": float(likelihood.is_greedy),
                "log-likelihood": likelihood.log_likelihood,
                **({} if hit is None else {"router hit": float(hit.mean())}),
            },
            "rank": likelihood.rank,
            **({} if sample.needle is None else {"needle": list(sample.needle)}),
            **({} if hit is None else {"router_hits": hit.astype(int).tolist()}),
        }
        for index, (sample, likelihood, generated, hit) in enumerate(
            zip(samples, likely, said, hits, strict=True)
        )
    ]


def _row_lines(judge: Judge, name: str, samples: list[RowSample], length: int) -> list[dict[str, Any]]:
    return [
        {
            **_common(name, index, length, sample),
            "prompt": sample.tokens.tolist(),
            "places": sample.places.tolist(),
            "answers": sample.targets.tolist(),
            "prompt_sha256": sha256(sample.tokens.astype("<i4").tobytes()),
            "scores": {
                "right": recall.share,
                "ranked first": recall.ranked_share,
                "log-likelihood": recall.log_likelihood,
            },
        }
        for index, (sample, recall) in enumerate(zip(samples, recalls(judge, samples, length), strict=True))
    ]


def _common(name: str, index: int, length: int, sample: TextSample | RowSample) -> dict[str, Any]:
    return {
        "task": name,
        "index": index,
        "length": length,
        "tokens": len(sample.tokens),
        "sources": dict(sample.sources),
        "labels": dict(sample.labels),
    }

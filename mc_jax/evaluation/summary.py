"""What is made at a run's end: the held-out result, what the router reads, a sample, the report."""

from typing import Any

import jax
from etils import epath

from mc_jax import config as configs
from mc_jax.config import TrainingConfig
from mc_jax.evaluation.perplexity import measure_caches, measure_held_out, reads_cache
from mc_jax.evaluation.report import Sample, write_report
from mc_jax.evaluation.result import write_result
from mc_jax.evaluation.router import held_out_shares, router_picture
from mc_jax.inference.generate import continue_text
from mc_jax.training.initial import read_provenance
from mc_jax.training.lock import RunLock
from mc_jax.training.metrics import read_metrics, record_hparams
from mc_jax.training.run import ParameterCounts, Run, count_parameters, load_run
from mc_jax.training.stages import read_stages

_TEMPERATURE = 0.8
_TOP_P = 0.95
_PROMPT_LETTERS = 60


def summarize_run(run_dir: epath.PathLike) -> dict[str, float] | None:
    """Write `result.json` and `report.html` into a run's folder; return the held-out result, if there is one.

    TensorBoard's table of runs has the settings and the result too.

    Of several processes, which must all call it, the first one does the work on a device of its own, as a
    single process would; the others have no result.

    Raises:
      ValueError: no such run, one without a checkpoint, or one that is being trained.
    """
    run = load_run(run_dir)
    if jax.process_index() > 0:
        return None
    with RunLock(run.folder):
        return _summarize(run)


def _summarize(run: Run) -> dict[str, float] | None:
    held_out = None if run.dataset.held_out is None else _held_out(run)
    metrics = read_metrics(run.folder)
    parameters = count_parameters(run.config, run.dataset.tokenizer.vocab_size)
    shares = held_out_shares(run)
    result = write_result(run, held_out, metrics, parameters, shares)
    results: dict[str, float | None] = {f"held_out_{name}": value for name, value in (held_out or {}).items()}
    results |= {} if shares is None else shares.metrics()
    record_hparams(run.folder, configs.to_flat_dict(run.config), results, run.step)
    provenance = read_provenance(run.folder)
    write_report(
        run.folder,
        title=run.folder.name,
        config_differences=configs.differences(run.config, configs.Config()),
        metrics=metrics,
        held_out=held_out,
        sample=_sample(run),
        router=router_picture(run, shares),
        facts={
            "parameters": f"{parameters.model:,}",
            **_trained_part(run.config.training, parameters),
            **({} if provenance is None else {"began with": provenance.summary()}),
            "optimizer steps": f"{run.step:,}",
            "tokens seen": f"{metrics[-1]['tokens']:,}" if metrics else "0",
            "training time": f"{metrics[-1]['seconds']:.0f} s" if metrics else "0 s",
        },
        made=_made(result),
        stages=read_stages(run.folder).changes(),
        reads_cache=reads_cache(run),
    )
    return held_out


def _held_out(run: Run) -> dict[str, float]:
    """The held-out result, and what cached memories add to it."""
    measured = measure_held_out(run)
    return measured.figures() | (measure_caches(run, measured) if reads_cache(run) else {})


def _sample(run: Run) -> Sample:
    """What the run's model writes after its prompt."""
    settings = run.config.evaluation
    prompt = first_words(run) if settings.sample_prompt is None else settings.sample_prompt
    if not settings.sample_tokens:
        return Sample(prompt=prompt, text="", sampling="")
    text = continue_text(
        run,
        prompt,
        tokens=settings.sample_tokens,
        temperature=_TEMPERATURE,
        top_p=_TOP_P,
        seed=run.config.training.seed,
    )
    return Sample(prompt=prompt, text=text, sampling=f"temperature {_TEMPERATURE}, top-p {_TOP_P}")


def first_words(run: Run) -> str:
    """The first words of the run's held-out text, or of its training text where it has no other."""
    store = run.dataset.train if run.dataset.held_out is None else run.dataset.held_out
    # A token is hardly less than a byte, and two letters beyond tell whether a word ends there.
    length = min(len(store.document(0)) + 1, 4 * _PROMPT_LETTERS)
    text = " ".join(run.dataset.tokenizer.decode(store.sequence(0, 0, length)).split())
    if len(text) <= _PROMPT_LETTERS:
        return text
    return text[: _PROMPT_LETTERS + 1].rpartition(" ")[0] or text[:_PROMPT_LETTERS]


def _made(result: dict[str, Any]) -> dict[str, str]:
    """When, where, by which code and command a result was made."""
    devices, processes = result["devices"], result["processes"]
    where = f"{result['device']}, {devices} of them" if devices > 1 else result["device"]
    return {
        "date": result["date"],
        "command": result["command"],
        "device": where + (f", {processes} processes" if processes > 1 else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        **({} if result["commit"] is None else {"commit": result["commit"]}),
    }


def _trained_part(training: TrainingConfig, parameters: ParameterCounts) -> dict[str, str]:
    """The report's line on what was trained, where that was not the whole model."""
    if (training.train, training.freeze, training.adapter_rank) == (None, None, None):
        return {}
    share = f"{parameters.trained:,} ({parameters.trained / parameters.model:.1%} of the model's number)"
    if training.adapter_rank is not None:
        share += f", with adapters of rank {training.adapter_rank}, which are merged here"
    return {"trained parameters": share}

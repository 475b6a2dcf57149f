"""What is made at a run's end: the held-out result, a sample, a picture of the router, the report."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mc_jax import config as configs
from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.evaluation.perplexity import evaluate_held_out
from mc_jax.evaluation.report import RouterPicture, write_report
from mc_jax.evaluation.result import write_result
from mc_jax.inference.generate import continue_text
from mc_jax.training.lock import RunLock
from mc_jax.training.metrics import read_metrics
from mc_jax.training.run import Run, load_run
from mc_jax.training.stages import read_stages

_TEMPERATURE = 0.8
_TOP_P = 0.95


def summarize_run(run_dir: epath.PathLike) -> dict[str, float] | None:
    """Write `result.json` and `report.html` into a run's folder; return the held-out result, if there is one.

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
    held_out = None if run.dataset.held_out is None else evaluate_held_out(run)
    metrics = read_metrics(run.folder)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(run.model)))
    write_result(run, held_out, metrics, parameters)
    prompt = run.config.evaluation.sample_prompt
    sample = ""
    if run.config.evaluation.sample_tokens:
        sample = continue_text(
            run,
            prompt,
            tokens=run.config.evaluation.sample_tokens,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            seed=run.config.training.seed,
        )
    write_report(
        run.folder,
        title=run.folder.name,
        config_differences=configs.differences(run.config, configs.Config()),
        metrics=metrics,
        held_out=held_out,
        sample_prompt=prompt,
        sample=sample,
        router=router_picture(run),
        facts={
            "parameters": f"{parameters:,}",
            "optimizer steps": f"{run.step:,}",
            "tokens seen": f"{metrics[-1]['tokens']:,}" if metrics else "0",
            "training time": f"{metrics[-1]['seconds']:.0f} s" if metrics else "0 s",
            "device": jax.local_devices()[0].device_kind,
            "sampling": f"temperature {_TEMPERATURE}, top-p {_TOP_P}",
        },
        stages=read_stages(run.folder).changes(),
    )
    return held_out


def router_picture(run: Run) -> RouterPicture | str:
    """What the memories of each layer read at the start of the first held-out document, mean over heads.

    A sentence that says why there is none, where it is so.
    """
    model, store = run.config.model, run.dataset.held_out
    if "memory" not in model.layer_pattern:
        return "This model has no layers with a memory."
    if not AGGREGATIONS[model.aggregation].uses_router:
        return "This model's aggregation has no router: nothing weighs its memories token by token."
    if store is None:
        return "There is no held-out text to read."
    length = min(run.config.data.context_length, len(store.document(0)) + 1)
    tokens = store.sequence(0, 0, length)
    gates = run.model.read_gates(jnp.asarray(tokens, jnp.int32)[None])
    assert gates is not None, f"{model.layer_pattern} layers with {model.aggregation!r} gave no gates"
    shares = np.concatenate([np.asarray(gates.cached), np.asarray(gates.online)[..., None]], axis=-1)
    return RouterPicture(
        gates=shares[:, 0].mean(axis=2),
        layers=[
            layer + 1
            for layer in range(model.num_layers)
            if model.layer_pattern[layer % len(model.layer_pattern)] == "memory"
        ],
        segment_length=model.segment_length,
        text=run.dataset.tokenizer.decode(tokens),
    )

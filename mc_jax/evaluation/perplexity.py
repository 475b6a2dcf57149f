"""Held-out loss over whole documents: every token is scored once, and all weigh the same."""

import math

import jax
import numpy as np
from etils import epath
from flax import nnx

from mc_jax.data.store import TokenStore
from mc_jax.data.windows import evaluation_windows
from mc_jax.nn import LanguageModel
from mc_jax.training.run import Run, load_run
from mc_jax.training.step import token_losses


def evaluate(
    model: LanguageModel, store: TokenStore, *, context_length: int, stride: int, batch_size: int
) -> dict[str, float]:
    """Loss of a model on all documents of a store.

    A document longer than `context_length` is read in windows that overlap: each scores its last `stride`
    tokens and reads the rest as context.

    Args:
      model: the language model.
      store: the documents.
      context_length: tokens in a window.
      stride: tokens scored in each but a document's first window.
      batch_size: windows evaluated together.

    Returns:
      loss (nats per token), perplexity, bits_per_byte (of the text, whatever the tokenizer), tokens,
      bytes, documents.
    """
    graph, parameters = nnx.split(model)

    @jax.jit
    def losses_of(parameters, batch):
        return token_losses(nnx.merge(graph, parameters), batch)

    # Sums in float64 on the host: a novel has hundreds of thousands of terms.
    total, tokens = 0.0, 0
    for batch in evaluation_windows(
        store, context_length=context_length, stride=stride, batch_size=batch_size
    ):
        total += float(np.asarray(losses_of(parameters, batch), np.float64).sum())
        tokens += int(batch["loss_mask"].sum())
    return {
        "loss": total / tokens,
        "perplexity": math.exp(total / tokens),
        "bits_per_byte": total / math.log(2) / store.num_bytes,
        "tokens": tokens,
        "bytes": store.num_bytes,
        "documents": len(store),
    }


def evaluate_held_out(run: Run) -> dict[str, float]:
    """The held-out result of a run, with the windows that its config names.

    Raises:
      ValueError: the run's data has no held-out split.
    """
    if run.dataset.held_out is None:
        raise ValueError(
            f"the data of {run.folder} has no held-out part; give one to mc-jax prepare with --held-out"
        )
    context_length = run.config.data.context_length
    return evaluate(
        run.model,
        run.dataset.held_out,
        context_length=context_length,
        stride=run.config.evaluation.stride or max(1, context_length // 2),
        batch_size=run.config.evaluation.batch_size,
    )


def evaluate_run(run_dir: epath.PathLike) -> dict[str, float]:
    """As `evaluate_held_out`, from a run's folder and its newest checkpoint.

    Raises:
      ValueError: no such run, or no held-out data.
    """
    return evaluate_held_out(load_run(run_dir))

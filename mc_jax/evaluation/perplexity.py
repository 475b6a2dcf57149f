"""Held-out loss over whole documents: every token is scored once, and all weigh the same."""

import math

from etils import epath

from mc_jax.data.store import TokenStore
from mc_jax.nn import LanguageModel
from mc_jax.training.held_out import HeldOut, windows_of
from mc_jax.training.run import Run, load_run
from mc_jax.training.step import split_model

_LARGEST_EXPONENT = 709.0  # of a float


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

    Raises:
      ValueError: the loss is not finite.
    """
    graph, parameters = split_model(model)
    held_out = HeldOut(graph, store, context_length=context_length, stride=stride, batch_size=batch_size)
    loss = held_out.loss(parameters)
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss on the held-out text is {loss}, though all weights are finite: activations leave the "
            "range of numbers; train with a lower --training.learning-rate"
        )
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf,
        "bits_per_byte": held_out.bits_per_byte(loss),
        "tokens": store.num_pairs,
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
    return evaluate(run.model, run.dataset.held_out, **windows_of(run.config))


def evaluate_run(run_dir: epath.PathLike) -> dict[str, float]:
    """As `evaluate_held_out`, from a run's folder and its newest checkpoint.

    Raises:
      ValueError: no such run, or no held-out data.
    """
    return evaluate_held_out(load_run(run_dir))

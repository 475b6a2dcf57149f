"""Loss on held-out documents, of a model that is trained or being trained: the same windows, the same code.

Shapes: B windows of a batch, T tokens.
"""

import math

import numpy as np
from flax import nnx

from mc_jax.config import Config
from mc_jax.data.dataset import Dataset
from mc_jax.data.store import TokenStore
from mc_jax.data.windows import evaluation_windows
from mc_jax.training.losses import BatchLosses
from mc_jax.training.router_shares import RouterOnText, has_router
from mc_jax.training.step import Parameters


class HeldOut:
    """Measures a model's weights on a store's documents; compiled once, for the current mesh if there is one.

    A document longer than `context_length` is read in windows that overlap: each scores its last `stride`
    tokens and reads the rest as context. Every token is scored once, and all weigh the same. All processes of
    a mesh must call it alike.

    Args:
      graph: the model's static part.
      store: the documents.
      context_length: T, tokens in a window.
      stride: tokens scored in each but a document's first window.
      batch_size: B, windows evaluated together, or as many more as fill the mesh's devices.
      tokens: how many are scored, about, in windows spread evenly over the text; None: all.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        store: TokenStore,
        *,
        context_length: int,
        stride: int,
        batch_size: int,
        tokens: int | None = None,
    ):
        self._store = store
        self._losses = BatchLosses(graph, batch_size)
        self._windows = {
            "context_length": context_length,
            "stride": stride,
            "batch_size": self._losses.batch_size,
            "every": 1 if tokens is None else max(1, -(-store.num_pairs // tokens)),
        }

    def loss(self, parameters: Parameters) -> float:
        """Nats per token."""
        # Sums in float64 on the host: a novel has hundreds of thousands of terms.
        total, tokens = 0.0, 0
        for batch in evaluation_windows(self._store, **self._windows):
            tokens += int(batch["loss_mask"].sum())
            total += float(np.asarray(self._losses(parameters, batch), np.float64).sum())
        return total / tokens if tokens else math.nan  # windows of prompts alone

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token as bits per byte of the text, whatever the tokenizer."""
        return loss / math.log(2) * self._store.num_scored / self._store.num_bytes


class WhileTraining:
    """The held-out results of a training, every so many of its steps, as its config says.

    They are on a part of the text, if the config says so, and the same part each time; beside them is what
    the routers read, of a model that has some. Sparse reads have the config's top_k, though it be annealed in
    training.
    """

    def __init__(self, config: Config, graph: nnx.GraphDef, dataset: Dataset):
        self._every, self._steps = config.evaluation.every, config.training.steps
        self._held_out = self._router = None
        if self._every is None:
            return
        assert dataset.held_out is not None, "run_folder has looked"
        windows = windows_of(config)
        self._held_out = HeldOut(graph, dataset.held_out, tokens=config.evaluation.tokens, **windows)
        if has_router(config.model):
            self._router = RouterOnText(graph, config, dataset.held_out)

    def is_due(self, step: int) -> bool:
        """Whether a result follows this step: every n-th, and the last."""
        return self._every is not None and (step % self._every == 0 or step == self._steps)

    def measure(self, parameters: Parameters) -> dict[str, float]:
        """What the metrics say of it: held_out_loss (nats per token), held_out_bits_per_byte, router_*."""
        assert self._held_out is not None
        loss = self._held_out.loss(parameters)
        shares = None if self._router is None else self._router.measure(parameters)
        return {
            "held_out_loss": loss,
            "held_out_bits_per_byte": self._held_out.bits_per_byte(loss),
            **({} if shares is None else shares.metrics()),
        }


def windows_of(config: Config) -> dict[str, int]:
    """The windows that a config names, as arguments of `HeldOut`."""
    context_length = config.data.context_length
    return {
        "context_length": context_length,
        "stride": config.evaluation.stride or max(1, context_length // 2),
        "batch_size": config.evaluation.batch_size,
    }

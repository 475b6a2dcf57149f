"""Generation: prefill of the prompt, then one token at a time from the growing cache.

Shapes: B batch, T tokens.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mc_jax.caching import Storage
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.inference.sampling import sample
from mc_jax.nn import LanguageModel
from mc_jax.training.run import Run, load_run


class Filled(NamedTuple):
    """Prompts filled up to one length: batches of one shape share a compiled program."""

    rows: np.ndarray
    """Each prompt, and zeros after it, int32 [B, T]; T is whole segments."""
    lengths: np.ndarray
    """Tokens of each prompt, int32 [B]."""


def fill(prompts: Sequence[np.ndarray], length: int) -> Filled:
    """Lay prompts into rows of `length` tokens, which none exceeds."""
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Filled(rows, np.array([len(prompt) for prompt in prompts], np.int32))


def generate(
    model: LanguageModel,
    prompts: Sequence[np.ndarray] | Filled,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> np.ndarray:
    """Continue prompts, which may differ in length.

    Args:
      model: the language model.
      prompts: token ids, one array of at least one token a row; or filled up already.
      tokens: how many to add to each.
      temperature: 0 is greedy, 1 the model's own distribution.
      top_p: share of the probability that is drawn from.
      seed: of the draws.
      storage: how cached memories are kept; without `max_cached` there is a place for each.

    Returns:
      [batch, tokens], int32.

    Raises:
      ValueError: an empty prompt, one with a token outside the vocabulary, a temperature or top_p out of
        range, a storage without effect or with too few places, or logits that are not finite.
    """
    segment_length = model.config.segment_length
    if not isinstance(prompts, Filled):
        # Whole segments: few shapes are ever compiled.
        longest = max(map(len, prompts))
        prompts = fill(prompts, -(-longest // segment_length) * segment_length)
    rows, lengths = prompts
    if not lengths.all():
        raise ValueError("a prompt has no tokens; begin it with the tokenizer's separator")
    words = model.embedding.shape[0]
    if not 0 <= np.min(rows) <= np.max(rows) < words:
        raise ValueError(f"a prompt has tokens outside the vocabulary of {words}; tokenize it anew")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; set it to 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; set it above 0 and to at most 1")
    completed = (int(lengths.max()) + tokens - 1) // segment_length
    reads_cache = AGGREGATION_FACTS[model.config.aggregation].reads_cache
    caches = "memory" in model.config.layer_pattern and reads_cache
    places = completed if storage.max_cached is None or not caches else storage.max_cached
    if storage.when_full == "error" and places < completed:
        raise ValueError(
            f"max_cached {places} is less than the {completed} segments of "
            f"{int(lengths.max()) + tokens} tokens; set it higher, or when_full to 'drop-oldest'"
        )
    graph, parameters = nnx.split(model)
    drawn, is_finite = _generate(
        graph,
        parameters,
        rows,
        lengths,
        jax.random.key(seed),
        jnp.float32(temperature),
        jnp.float32(top_p),
        tokens=tokens,
        max_length=rows.shape[1] + tokens,
        storage=storage,
    )
    if not is_finite.all():
        row, token = np.argwhere(~np.asarray(is_finite))[0]
        raise ValueError(
            f"the logits of token {token + 1} after prompt {row + 1} are not finite, so there is nothing to "
            "draw from: the weights are too large for this precision, or the training diverged"
        )
    return np.asarray(drawn)


@functools.partial(jax.jit, static_argnames=("graph", "tokens", "max_length", "storage"))
def _generate(graph, parameters, rows, lengths, key, temperature, top_p, *, tokens, max_length, storage):
    model = nnx.merge(graph, parameters)
    logits, caches = model.prefill(rows, lengths, max_length, storage)

    def add(carry, key):
        logits, caches = carry
        token = sample(key, logits, temperature, top_p)
        # Not all: a token may be ruled out by a logit of minus infinity.
        is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
        return model.step(token, caches), (token, is_finite)

    _, (drawn, is_finite) = jax.lax.scan(add, (logits, caches), jax.random.split(key, tokens))
    return drawn.T, is_finite.T


def continue_text(
    run: Run,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> str:
    """The text with which a run's model goes on from `prompt`, up to the end of the document."""
    tokenizer = run.dataset.tokenizer
    ids = np.concatenate([[tokenizer.separator_id], tokenizer.encode(prompt)]).astype(np.int32)
    (drawn,) = generate(
        run.model, [ids], tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, storage=storage
    )
    ends = np.flatnonzero(drawn == tokenizer.separator_id)
    return tokenizer.decode(drawn[: ends[0]] if ends.size else drawn)


def generate_run(
    run_dir: epath.PathLike,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> str:
    """What `continue_text` gives, from a run's folder and its newest checkpoint.

    Raises:
      ValueError: no such run, or settings out of range.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; set it to 1 or more")
    return continue_text(
        load_run(run_dir),
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        storage=storage,
    )

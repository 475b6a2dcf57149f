"""Samples judged by a model: log-likelihood of answers, greedy generation, rows read at their places.

Prompts are filled up to one length and batches to one size, so that a task of one length compiles once. What
fills them up comes after the prompt, where no prediction of a causal model sees it, or in rows of its own.

Shapes: B rows, T tokens, A answers, N tokens of an answer, P places, C candidates.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.caching import Storage
from mc_jax.data.tokenizer import Tokenizer
from mc_jax.evaluation.needle import Span, hits_at_end, segments_of
from mc_jax.evaluation.tasks.metrics import METRICS, Generated
from mc_jax.evaluation.tasks.sample import RowSample, TextSample, TextTask, answer_tokens
from mc_jax.inference.generate import generate
from mc_jax.nn import LanguageModel
from mc_jax.training.router_shares import has_router

_ANSWER_TOKENS = 8  # answers are filled up to a multiple of this
_PLACES = 32  # and places and candidates of this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """A model with what it is asked through."""

    model: LanguageModel
    """What is judged."""
    tokenizer: Tokenizer
    """Its own."""
    batch_size: int = 8
    """B, samples that are read together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a model finds an answer."""

    log_likelihood: float
    """Sum over the answer's tokens given the prompt, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""
    rank: int
    """1 + how many alternatives are at least as likely."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """How a row was read at its places."""

    share: float
    """Share of the targets that are the likeliest token."""
    ranked_share: float
    """Share of the targets that are the likeliest of the candidates."""
    log_likelihood: float
    """Mean over the places, in nats."""


def likelihoods(judge: Judge, samples: Sequence[TextSample], length: int) -> list[Likelihood]:
    """Log-likelihood of each sample's first answer, ranked with its alternatives.

    The prompt is read in parallel, and the answers from its caches token by token, as generation does.

    Args:
      judge: the model.
      samples: which may differ in length and in how many alternatives they have.
      length: tokens that no prompt exceeds.

    Raises:
      ValueError: logits that are not finite.
    """
    graph, parameters = nnx.split(judge.model)
    answers = [
        [answer_tokens(judge.tokenizer, text) for text in (sample.answers[0], *sample.alternatives)]
        for sample in samples
    ]
    most = max(map(len, answers))
    longest = _round_up(max(len(ids) for group in answers for ids in group), _ANSWER_TOKENS)
    padded = _round_up(length, judge.model.config.segment_length)
    found = []
    for batch in _batches(range(len(samples)), judge.batch_size):
        rows, lengths = _filled([samples[number].tokens for number in batch], padded)
        asked = np.zeros((most, len(batch), longest), np.int32)
        for row, number in enumerate(batch):
            for place, ids in enumerate(answers[number]):
                asked[place, row, : len(ids)] = ids
        scored, greedy = map(np.asarray, _answers(graph, parameters, rows, lengths, asked))
        for row, number in enumerate(batch):
            counts = [len(ids) for ids in answers[number]]
            sums = [
                float(np.sum(scored[place, row, :count], dtype=np.float64))
                for place, count in enumerate(counts)
            ]
            _must_be_finite(sums, number)
            found.append(
                Likelihood(
                    log_likelihood=sums[0],
                    is_greedy=bool(np.all(greedy[0, row, : counts[0]])),
                    rank=1 + sum(value >= sums[0] for value in sums[1:]),
                )
            )
    return found[: len(samples)]


def generations(judge: Judge, task: TextTask, samples: Sequence[TextSample]) -> list[tuple[Generated, float]]:
    """What greedy decoding says to each prompt up to where it stops, and its score by the task's metric.

    Raises:
      ValueError: logits that are not finite.
    """
    found: dict[int, tuple[Generated, float]] = {}
    # Neighbours in length share a program: `generate` fills prompts up to whole segments.
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].tokens))
    for batch in _batches(order, judge.batch_size):
        prompts = [samples[number].tokens for number in batch]
        drawn = generate(judge.model, prompts, tokens=task.new_tokens, temperature=0.0)
        for number, ids in zip(batch, drawn, strict=True):
            said = _until_stop(judge.tokenizer, ids, stops_at_newline=task.stops_at_newline)
            found[number] = (said, METRICS[task.metric](said, samples[number].answers))
    return [found[number] for number in range(len(samples))]


def router_hits(judge: Judge, samples: Sequence[TextSample], length: int) -> list[np.ndarray | None]:
    """Whether each layer and head [L, H], at a prompt's last token, reads the needle's segment most.

    None for a sample whose needle is not known, or not in the cache yet; for all samples without a router, or
    with segments that are read in groups.

    Args:
      judge: the model.
      samples: their prompts are read.
      length: tokens that no prompt exceeds.
    """
    config, tokenizer = judge.model.config, judge.tokenizer
    found: list[np.ndarray | None] = [None] * len(samples)
    needles = {number: Span(*sample.needle) for number, sample in enumerate(samples) if sample.needle}
    if not has_router(config) or config.segmentation != "constant":
        return found
    padded = _round_up(length, config.segment_length)
    for batch in _batches(list(needles), judge.batch_size):
        rows, lengths = _filled([samples[number].tokens for number in batch], padded)
        segments = [
            segments_of(
                needles[number],
                samples[number].prompt,
                tokenizer.bytes_of(samples[number].tokens[1:]),
                config.segment_length,
            )
            for number in batch
        ]
        for number, hits in zip(batch, hits_at_end(judge.model, rows, lengths, segments), strict=True):
            found[number] = hits
    return found


def recalls(judge: Judge, samples: Sequence[RowSample], length: int, fewest: int = 1) -> list[Recall]:
    """How each row is read at its places, by the forward pass of training.

    Args:
      judge: the model.
      samples: which may differ in length and in how many places they have.
      length: tokens that no row exceeds.
      fewest: as many places are read in each row at least, so that several calls share a program.

    Raises:
      ValueError: logits that are not finite.
    """
    graph, parameters = nnx.split(judge.model)
    padded = _round_up(length, judge.model.config.segment_length)
    most = _round_up(max(fewest, *(len(sample.places) for sample in samples)), _PLACES)
    choices = _round_up(max(len(sample.candidates) for sample in samples), _PLACES)
    found = []
    for batch in _batches(range(len(samples)), judge.batch_size):
        rows = [samples[number] for number in batch]
        tokens, _ = _filled([row.tokens for row in rows], padded)
        places, targets = (
            _filled([getattr(row, name) for row in rows], most)[0] for name in ("places", "targets")
        )
        # Candidates that come twice change no choice among them.
        candidates = [np.resize(row.candidates, choices) for row in rows]
        found_there = _at_places(graph, parameters, tokens, places, targets, np.stack(candidates))
        scored, best, ranked = map(np.asarray, found_there)
        for row, number in enumerate(batch):
            count = len(samples[number].places)
            right = targets[row, :count]
            mean = float(np.mean(scored[row, :count], dtype=np.float64))
            _must_be_finite([mean], number)
            found.append(
                Recall(
                    share=float(np.mean(best[row, :count] == right)),
                    ranked_share=float(np.mean(ranked[row, :count] == right)),
                    log_likelihood=mean,
                )
            )
    return found[: len(samples)]


@jax.jit(static_argnames=("graph",))
def _answers(graph, parameters, rows, lengths, answers):
    """Log-probability of each token of each answer, and whether it is the likeliest [A, B, N].

    Args:
      graph: the model's static part.
      parameters: its weights.
      rows: prompts, filled up [B, T].
      lengths: tokens of each prompt [B].
      answers: filled up [A, B, N].
    """
    model = nnx.merge(graph, parameters)
    logits, caches = model.prefill(rows, lengths, rows.shape[1] + answers.shape[2], Storage())

    def add(carry, tokens):
        logits, caches = carry
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
        return model.step(tokens, caches), (chosen, jnp.argmax(logits, axis=-1) == tokens)

    # All answers begin at the same caches; each run of steps has its own copy of what it changes.
    def one(answer):
        return jax.lax.scan(add, (logits, caches), answer.T)[1]

    scored, greedy = jax.lax.map(one, answers)
    return jnp.swapaxes(scored, 1, 2), jnp.swapaxes(greedy, 1, 2)


@jax.jit(static_argnames=("graph",))
def _at_places(graph, parameters, tokens, places, targets, candidates):
    """Log-probability of each target, the likeliest token, the likeliest candidate, each [B, P].

    Args:
      graph: the model's static part.
      parameters: its weights.
      tokens: [B, T].
      places: [B, P].
      targets: [B, P].
      candidates: [B, C].
    """
    model = nnx.merge(graph, parameters)
    features = model.features(tokens)
    output_map = model.output_map.astype(features.dtype)

    def read(block):  # places and targets of some places [B, p]
        places, targets = block
        here = jnp.take_along_axis(features, places[:, :, None], axis=1)
        logits = jnp.einsum("bpd,vd->bpv", here, output_map)
        scored = jax.nn.log_softmax(logits.astype(jnp.float32))
        chosen = jnp.take_along_axis(scored, targets[:, :, None], axis=2)[:, :, 0]
        among = jnp.take_along_axis(scored, candidates[:, None, :], axis=2)
        ranked = jnp.take_along_axis(candidates, jnp.argmax(among, axis=-1), axis=1)
        return chosen, jnp.argmax(scored, axis=-1), ranked

    # A block after the other: the logits of a thousand places would outgrow the model.
    blocks = [jnp.swapaxes(values.reshape(len(values), -1, _PLACES), 0, 1) for values in (places, targets)]
    return [jnp.swapaxes(found, 0, 1).reshape(places.shape) for found in jax.lax.map(read, tuple(blocks))]


def _batches(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Groups of one size; the last is filled up with its first, whose results come once too often."""
    for group in itertools.batched(numbers, size):
        yield [*group, *[group[0]] * (size - len(group))]


def _filled(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, with zeros after each, and how long each was."""
    filled = np.zeros((len(rows), length), np.int32)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled, np.array([len(values) for values in rows], np.int32)


def _until_stop(tokenizer: Tokenizer, ids: np.ndarray, *, stops_at_newline: bool) -> Generated:
    ends = np.flatnonzero(ids == tokenizer.separator_id)
    ids = ids[: ends[0]] if ends.size else ids
    text = tokenizer.decode(ids)
    return Generated(text.partition("\n")[0] if stops_at_newline else text, ids, tokenizer)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _must_be_finite(values: Sequence[float], number: int) -> None:
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"the log-likelihood of sample {number} is not finite, so it tells nothing: the weights are too "
            "large for this precision, or the training diverged"
        )

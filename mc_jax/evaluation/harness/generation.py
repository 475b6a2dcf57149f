"""Text that a model says to prompts, up to a stop: batches of few shapes, never a part of a stop string."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.models.utils import normalize_gen_kwargs

from mc_jax.data.tokenizer import Tokenizer
from mc_jax.evaluation.harness.sizes import filled_size
from mc_jax.evaluation.tasks.scoring import Judge
from mc_jax.inference.generate import fill, generate

_WITHOUT_EFFECT = {"num_beams": (1,), "top_k": (None, 0, -1), "do_sample": (True, False, None)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is generated."""

    tokens: int
    """Tokens that the text has at most."""
    until: tuple[str, ...] = ()
    """Stops: the text ends before the first of them, and at the end of the document."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Share of the probability that is drawn from."""

    @property
    def reserve(self) -> int:
        """Tokens that are generated further, to see whether a stop that has begun at the end is one.

        A byte is the least that a token says.
        """
        return max((len(stop.encode()) - 1 for stop in self.until), default=0)


def decoding_of(settings: Mapping[str, Any], tokens: int) -> Decoding:
    """What a task's `generation_kwargs` mean.

    Args:
      settings: as lm-eval hands them over: until, max_gen_toks or its other names, do_sample, temperature,
        top_p.
      tokens: where they do not say how many.

    Raises:
      ValueError: a setting that has no effect here and would have one elsewhere, or no room for a token.
    """
    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), tokens))
    samples = bool(given.get("do_sample"))
    decoding = Decoding(
        tokens=int(given.pop("max_gen_toks")),
        until=tuple(stop for stop in given.pop("until") if stop),
        temperature=float(given.pop("temperature", 1.0)) if samples else 0.0,
        top_p=float(given.pop("top_p", 1.0)) if samples else 1.0,
    )
    if decoding.tokens < 1:
        raise ValueError(f"max_gen_toks is {decoding.tokens}; set it to 1 or more")
    for name, value in given.items():
        greedy = decoding.temperature == 0 and name in ("temperature", "top_p", "top_k")
        if not greedy and value not in _WITHOUT_EFFECT.get(name, ()):
            raise ValueError(
                f"mc_jax generates without {name} ({value!r} is asked); take it out of generation_kwargs"
            )
    return decoding


def generate_texts(
    judge: Judge,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    *,
    length: int,
    seed: int = 0,
    told: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """What the model says to each prompt.

    Args:
      judge: the model.
      prompts: tokens, at least one each; cut from the left to what `length` leaves.
      decoding: how.
      length: tokens of prompt and text together, at most.
      seed: of the draws; batches draw from one after the other.
      told: hears how many more are done.

    Raises:
      ValueError: no room for a prompt, or logits that are not finite.
    """
    room = length - decoding.tokens
    if room < 1:
        raise ValueError(
            f"max_gen_toks {decoding.tokens} leaves no room for a prompt in a context of {length} tokens; "
            "set context_length higher, or max_gen_toks lower"
        )
    cut = [prompt[-room:] for prompt in prompts]
    found: dict[int, str] = {}
    order = sorted(range(len(cut)), key=lambda number: -len(cut[number]))
    segment_length = judge.model.config.segment_length
    for batch, numbers in enumerate(itertools.batched(order, judge.batch_size)):
        size = filled_size(len(cut[numbers[0]]), segment_length=segment_length, most=room)
        # The last batch is filled up with its first prompt.
        rows = [cut[number] for number in (*numbers, *[numbers[0]] * (judge.batch_size - len(numbers)))]
        drawn = generate(
            judge.model,
            fill(rows, size),
            tokens=decoding.tokens + decoding.reserve,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=seed + batch,
        )
        for number, ids in zip(numbers, drawn, strict=False):
            found[number] = text_until(judge.tokenizer, ids, decoding)
        told(len(numbers))
    return [found[number] for number in range(len(prompts))]


def text_until(tokenizer: Tokenizer, ids: np.ndarray, decoding: Decoding) -> str:
    """The text of generated tokens before the first stop, or before the end of the document.

    Args:
      tokenizer: theirs.
      ids: `decoding.tokens` of them, and its reserve.
      decoding: where the text ends.
    """
    ends = np.flatnonzero(ids == tokenizer.separator_id)
    ids = ids[: ends[0]] if ends.size else ids
    text, further = tokenizer.decode(ids[: decoding.tokens]), tokenizer.decode(ids)
    starts = [further.find(stop) for stop in decoding.until]
    start = min((start for start in starts if start >= 0), default=len(text))
    return further[:start] if start < len(text) else text

"""Passkey retrieval (Landmark attention, arXiv:2305.16300): a number in garbage, by length and depth."""

from mc_jax.evaluation.tasks.sample import Ask, TextSample, TextTask, fit, place_of
from mc_jax.evaluation.tasks.sources import NOISE, NOISE_SOURCE

_BEGIN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"
_LARGEST = 50_000
_NEW_TOKENS = 6  # of a space and five digits, whatever the tokenizer
_DEPTHS = 11


def passkey_prompt(key: int, before: int, after: int) -> str:
    """The prompt with so many characters of garbage before the pass key and after it."""
    parts = [_BEGIN, _garbage(before), _NEEDLE.format(key=key), _garbage(after), _QUESTION]
    return "\n".join(parts)


def draw(ask: Ask) -> TextSample:
    """Samples take turns in depth: 0, 10, ..., 100 % of the garbage stands before the pass key."""
    random = ask.random("passkey")
    depth = ask.index % _DEPTHS / (_DEPTHS - 1)
    key, *others = _distinct(random, 1 + ask.alternatives)

    def render(characters: int) -> str:
        before = round(depth * characters)
        return passkey_prompt(key, before, characters - before)

    prompt, tokens = fit(render, ask, _NEW_TOKENS)
    return TextSample(
        prompt=prompt,
        tokens=tokens,
        answers=(str(key),),
        alternatives=tuple(map(str, others)),
        depth=depth,
        sources={"haystack": NOISE_SOURCE},
        needle=place_of(_NEEDLE.format(key=key), prompt),
    )


def _garbage(characters: int) -> str:
    repeated = f"{NOISE} "
    return (repeated * (characters // len(repeated) + 1))[:characters]


def _distinct(random, count: int) -> list[int]:
    return [int(number) + 1 for number in random.choice(_LARGEST, count, replace=False)]


PASSKEY = TextTask(
    name="passkey",
    summary="a pass key in garbage, at depths of 0 to 100 %",
    draw=draw,
    metric="exact",
    new_tokens=_NEW_TOKENS,
)

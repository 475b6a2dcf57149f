"""The value of a key in a document, asked for as Based asks of SWDE and FDA (arXiv:2402.18668).

The prompt is the document and "Key:", the metric whether the value is said. Documents are generated, lines
"key: value" between passages of a text, or read from a JSONL file with the fields text, key and value, as
hazyresearch/based-swde-v2 and based-fda have; of those a window around the value is kept.
"""

import functools
import json
import re
from pathlib import Path

from mc_jax.evaluation.tasks.sample import Ask, TextSample, TextTask, TooShort, fit, place_of, prompt_tokens
from mc_jax.evaluation.tasks.sources import essays, names

_NEW_TOKENS = 48
_PASSAGE_WORDS = 40
_FIELDS = ("text", "key", "value")
_SLACK = 16  # tokens beside the value that a window has, at least
_MARK = "\ufffd"  # of bytes that are no character: of one that the window cuts


def key_value_prompt(document: str, key: str) -> str:
    """A document and the key whose value is to follow."""
    return f"{document.strip('.')}. {key[:1].upper()}{key[1:]}:"


def draw(ask: Ask) -> TextSample:
    """A sample of a file's documents in their order, or of generated ones.

    Raises:
      ValueError: a file of other lines, or with fewer documents than samples.
    """
    return _generated(ask) if ask.documents is None else _read(ask, ask.documents)


def _generated(ask: Ask) -> TextSample:
    random = ask.random("key-value")
    most = ask.length // 8 + 1 + ask.alternatives  # a line takes more than eight tokens
    drawn = [name.replace("-", " ").capitalize() for name in names().draw(random, 2 * most)]
    keys, values = drawn[:most], [value.lower() for value in drawn[most:]]
    depth = float(random.random())

    def document(words: int) -> tuple[str, int]:
        """The document of so many words, and which of its lines is asked for."""
        text = essays().first(words)
        lines, count = [], max(1, words // _PASSAGE_WORDS)
        for number in range(count):
            end = words if number == count - 1 else (number + 1) * _PASSAGE_WORDS
            lines += [f"{keys[number]}: {values[number]}", " ".join(text[number * _PASSAGE_WORDS : end])]
        return "\n".join(lines), round(depth * (count - 1))

    def render(words: int) -> str:
        text, asked = document(words)
        return key_value_prompt(text, keys[asked])

    prompt, tokens = fit(render, ask, _NEW_TOKENS, least=1)
    lines = [number for number, key in enumerate(keys) if f"{key}: " in prompt]
    asked = next(number for number in lines if prompt.endswith(f". {keys[number]}:"))
    # Values of the document's other lines come first.
    others = [values[number] for number in lines if number != asked] + values[len(lines) :]
    return TextSample(
        prompt=prompt,
        tokens=tokens,
        answers=(values[asked],),
        alternatives=tuple(others[: ask.alternatives]),
        depth=prompt.index(f"{keys[asked]}: ") / len(prompt),
        sources={"document": f"lines between passages of {essays().source}", "keys": names().source},
        needle=place_of(f"{keys[asked]}: {values[asked]}", prompt),
        labels={"key": keys[asked], "lines": len(lines)},
    )


def _read(ask: Ask, file: Path) -> TextSample:
    documents = _documents(file)
    if ask.index >= len(documents):
        raise ValueError(
            f"{file} has {len(documents)} documents with their value in the text; "
            "set --recall.samples to that or less"
        )
    document = documents[ask.index]
    text, key, value = (document[field] for field in _FIELDS)
    begin = text.lower().index(value.lower())
    ids = ask.tokenizer.encode(text)
    place = len(ask.tokenizer.encode(text[:begin]))
    room = ask.length - _NEW_TOKENS - len(prompt_tokens(ask.tokenizer, key_value_prompt("", key)))
    while room > 0:
        start = max(0, place - room // 2)
        window = ask.tokenizer.decode(ids[start : start + room]).strip(_MARK)
        prompt = key_value_prompt(window, key)
        tokens = prompt_tokens(ask.tokenizer, prompt)
        if len(tokens) <= ask.length - _NEW_TOKENS:
            break
        room -= max(1, len(tokens) - ask.length + _NEW_TOKENS)
    else:
        whole = key_value_prompt(document["value"], key)
        raise TooShort(ask.length, len(prompt_tokens(ask.tokenizer, whole)) + _NEW_TOKENS + _SLACK)
    found = re.search(re.escape(value), prompt, re.IGNORECASE)
    others = dict.fromkeys(other["value"] for other in documents if other["key"] == key)
    others.pop(value, None)
    return TextSample(
        prompt=prompt,
        tokens=tokens,
        answers=(value,),
        alternatives=tuple(others)[: ask.alternatives],
        depth=0.0 if found is None else found.start() / len(prompt),
        sources={"document": f"{file.name} of the user"},
        needle=None if found is None else found.span(),
        labels={"key": key, "document": ask.index},
    )


@functools.cache
def _documents(file: Path) -> list[dict[str, str]]:
    """The documents of a file that have their value in the text; one of a letter is no value to look for."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            document = {field: str(values[field]) for field in _FIELDS}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no JSON object with the fields {', '.join(_FIELDS)} "
                f"({type(error).__name__})"
            ) from None
        value = document["value"]
        if len(value) > 1 and value.lower() in document["text"].lower():
            found.append(document)
    if not found:
        raise ValueError(f"{file} has no document with its value in the text")
    return found


KEY_VALUE = TextTask(
    name="key-value",
    summary="the value of a key in a document",
    draw=draw,
    metric="contains-any",
    new_tokens=_NEW_TOKENS,
    stops_at_newline=True,
    reads_documents=True,
)

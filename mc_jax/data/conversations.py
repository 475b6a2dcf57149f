"""Conversations as texts of which the responses alone are scored: prompts and responses, or chat messages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from mc_jax.data.documents import Document

FIELDS = ("messages", "conversations", "prompt", "response", "completion")
"""What a line or row may have: "messages", "conversations", or "prompt" with "response" or "completion"."""
_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles of "conversations", whose messages have "from" and "value", by the names that templates know."""

_PLAIN = """\
{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

type Message = Mapping[str, str]
"""A role, such as "user" or "assistant", and a content."""


class ChatTemplate:
    """Makes a text of chat messages, as chat templates of tokenizers do.

    Args:
      source: Jinja, given `messages` and `add_generation_prompt`; None: a line "<|role|>" before a content.
      name: what the template is called in messages.

    Raises:
      ValueError: the source is no Jinja.
    """

    def __init__(self, source: str | None = None, name: str = "the template"):
        self._name = name
        # Templates come from others: they may compute, and reach nothing.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        plain = environment.overlay(trim_blocks=False, lstrip_blocks=False)
        try:
            self._template = plain.from_string(_PLAIN) if source is None else environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name} is no Jinja template (line {error.lineno}: {error.message})") from None
        self.has_source = source is not None
        """Whether the template is the user's."""

    def render(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The text of some messages.

        Args:
          messages: a conversation, or its beginning.
          asks: whether the text ends where an assistant's response is to begin.

        Raises:
          ValueError: the template does not take them.
        """
        try:
            # A separator stands around every document, so that a template need not put one there.
            return self._template.render(
                messages=messages,
                add_generation_prompt=asks,
                bos_token="",
                eos_token="",
                raise_exception=_refuse,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{self._name} does not take the messages ({error})") from None


def read_template(path: Path | None) -> ChatTemplate:
    """A template from a file of Jinja, or the "chat_template" of a tokenizer_config.json; None: a plain one.

    Raises:
      ValueError: there is no such file, or no template in it.
    """
    if path is None:
        return ChatTemplate()
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give a chat template in Jinja, or a tokenizer_config.json"
        )
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    if path.suffix == ".json":
        try:
            values = json.loads(source)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); give a chat template in Jinja") from None
        source = values.get("chat_template") if isinstance(values, dict) else None
        if not isinstance(source, str):
            raise ValueError(f'{path} has no text "chat_template"; give a chat template in Jinja')
    return ChatTemplate(source, str(path))


def conversation(name: str, values: Any, template: ChatTemplate, *, place: str) -> Document:
    """A line or row as a text, with the places of its responses.

    A response is what the template adds to the text that asks for it: its content, and what ends it. A prompt
    and its response stand as they are, one after the other, unless the template is the user's.

    Args:
      name: of the document.
      values: the line's fields, or its messages.
      template: what makes a text of messages.
      place: of the line, for people.

    Raises:
      ValueError: there is no conversation in the values, or the template does not go on where it asked.
    """
    if isinstance(values, list):
        values = {"messages": values}
    fields = values if isinstance(values, dict) else {}
    if (
        listed := next((fields[name] for name in FIELDS[:2] if fields.get(name) is not None), None)
    ) is not None:
        messages = _messages(listed, place)
    else:
        prompt, response = _pair(values, place)
        if not template.has_source:
            return Document(name, prompt + response, ((len(prompt), len(prompt) + len(response)),))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    spans = []
    try:
        text = template.render(messages)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = template.render(messages[:number], asks=True)
                until = template.render(messages[: number + 1])
                if not until.startswith(before) or not text.startswith(until):
                    raise ValueError(
                        "the template writes a response otherwise than after the prompt that asks for it"
                    )
                spans.append((len(before), len(until)))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not spans:
        raise ValueError(f'{place} has no message of the role "assistant"; remove it')
    return Document(name, text, tuple(spans))


def _pair(values: Any, place: str) -> tuple[str, str]:
    fields = values if isinstance(values, dict) else {}
    prompt, response = fields.get("prompt"), fields.get("response", fields.get("completion"))
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ValueError(
            f"{place} has neither messages nor texts prompt and response (or completion); "
            f"it has: {', '.join(fields) or type(values).__name__}"
        )
    if not response:
        raise ValueError(f"{place} has an empty response; remove it")
    return prompt, response


def _messages(values: Any, place: str) -> list[Message]:
    messages: list[Message] = [_message(value) for value in values] if isinstance(values, list) else []
    if not messages or not all(
        isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError(
            f"{place}: messages is no list of objects with texts role and content (or from and value); "
            "write it so"
        )
    return messages


def _message(value: Any) -> dict[str, Any]:
    """A message with role and content, as far as there are such in what is written in one of three ways."""
    if not isinstance(value, dict):
        return {}
    if "role" not in value and "from" in value:
        return {"role": _SPEAKERS.get(value["from"], value["from"]), "content": value.get("value")}
    parts = value.get("content")
    if isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in parts
    ):
        texts = [part.get("text") for part in parts]
        return value | {"content": "".join(texts) if all(isinstance(text, str) for text in texts) else None}
    return value


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

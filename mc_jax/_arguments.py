"""Command-line arguments to frozen dataclasses by tyro; a mistake becomes one line instead of tyro's box."""

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tyro

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UsageError(ValueError):
    """A command line that cannot be meant: one line with what, where and cure."""


def parse[T](
    kind: type[T],
    arguments: Sequence[str],
    *,
    program: str,
    description: str | None = None,
    default: T | None = None,
) -> T:
    """Build a `kind` from command-line arguments; `--help` prints and exits with 0.

    Args:
      kind: a dataclass whose fields are the options.
      arguments: what the user typed after `program`.
      program: words before the arguments, for help and errors.
      description: text at the top of the help; None: the docstring of `kind`.
      default: values of the options that are not given.

    Raises:
      UsageError: an option that does not exist (the nearest one is named), or a value that does not fit.
    """

    def run(words: Sequence[str]) -> tuple[T, list[str]]:
        given: dict[str, Any] = {} if default is None else {"default": default}
        return tyro.cli(
            kind, args=words, prog=program, description=description, return_unknown_args=True, **given
        )

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, left_over = run(arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        left_over, reason = [], _first_paragraph(errors.getvalue())
    else:
        if not left_over:
            return parsed
        reason = _unexpected(left_over[0])
    unknown = _unknown_option([*left_over, *arguments], lambda: run(["--help"]))
    raise UsageError(f"{unknown or reason}; see {program} --help")


def must_be_run(folder: str) -> None:
    """See that a folder is one that `mc-jax train` wrote.

    Raises:
      UsageError: it is not.
    """
    from etils import epath

    if not (epath.Path(folder) / "config.json").is_file():
        raise UsageError(
            f"there is no run in {folder} (no config.json); give the folder that mc-jax train wrote, "
            "for example runs/quickstart"
        )


def _first_paragraph(box: str) -> str:
    """What tyro says went wrong, without frame, colours, line breaks and the help that follows."""
    lines = (line.strip("│| ") for line in _COLOUR.sub("", box).splitlines()[1:])
    content = itertools.dropwhile(_is_rule, lines)
    reason = " ".join(itertools.takewhile(lambda line: not _is_rule(line), content)).rstrip(". ")
    reason = reason.removeprefix("Error parsing ")
    return reason[:1].lower() + reason[1:]


def _is_rule(line: str) -> bool:
    return not line.strip("─-╭╮╰╯")


def _unexpected(word: str) -> str:
    if word.lower() in ("true", "false"):
        return f"unexpected argument {word!r}: a switch takes no value, its opposite is written --no-..."
    return f"unexpected argument {word!r}"


def _unknown_option(words: Sequence[str], show_help: Callable[[], object]) -> str | None:
    """Name the first option that the help does not know, and the nearest that it does."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        show_help()
    known = set(re.findall(r"--[a-z][\w.-]*", _COLOUR.sub("", text.getvalue())))
    for word in words:
        option = word.partition("=")[0]
        spelled = option.replace("_", "-")
        if re.match(r"--?[a-zA-Z]", option) and spelled not in known | {"-h"}:
            return f"there is no option {option}{did_you_mean(spelled, known)}"
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Point to the known name nearest to `name`, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""

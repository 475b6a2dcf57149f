"""What a user types, checked without doing it: mc-jax's own parser reads it, and nothing runs."""

import contextlib
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tyro

from mc_jax.cli import main
from mc_jax.config import validate


@contextlib.contextmanager
def _silence(errors: io.StringIO) -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        yield


class _Parsed(Exception):
    """Carries what tyro made of the words, out of the command that would go on with it."""


def parse_mc_jax(words: Sequence[str]) -> Any:
    """What `mc-jax WORDS` would work with; the test fails where it would refuse them.

    Recipe and options must be there, and the settings they make must fit together.
    """
    parsed = parse_main(main, words)
    if hasattr(parsed, "config"):
        try:
            validate(parsed.config)
        except ValueError as error:
            pytest.fail(f"mc-jax {shlex.join(words)}\nis refused: {error}")
    return parsed


def parse_main(program: Callable[[list[str]], object], words: Sequence[str]) -> Any:
    """What tyro makes of the words that a program's `main` is given; None: it shows a help."""
    parse = tyro.cli

    def parse_and_stop(*arguments: Any, **options: Any) -> Any:
        parsed, left_over = parse(*arguments, **options)
        if left_over:
            return parsed, left_over
        raise _Parsed(parsed)

    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, _silence(errors):
        patch.setattr(tyro, "cli", parse_and_stop)
        try:
            code = program(list(words))
        except _Parsed as stopped:
            return stopped.args[0]
        except SystemExit as stopped:  # a help that was asked for
            if not stopped.code:
                return None
            raise
    pytest.fail(f"{shlex.join(words)}\nis refused with exit code {code}: {errors.getvalue()}")

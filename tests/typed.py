"""What a user types, checked without doing it: mc-jax's own parser reads it, and nothing runs."""

import contextlib
import io
import shlex
from collections.abc import Sequence
from typing import Any

import pytest
import tyro

from mc_jax.cli import main
from mc_jax.config import validate


class _Parsed(Exception):
    """Carries what tyro made of the words, out of the command that would go on with it."""


def parse_mc_jax(words: Sequence[str]) -> Any:
    """What `mc-jax WORDS` would work with; the test fails where it would refuse them.

    Recipe and options must be there, and the settings they make must fit together.
    """
    shown = f"mc-jax {shlex.join(words)}"
    parse = tyro.cli

    def parse_and_stop(*arguments: Any, **options: Any) -> Any:
        parsed, left_over = parse(*arguments, **options)
        if left_over:
            return parsed, left_over
        raise _Parsed(parsed)

    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(tyro, "cli", parse_and_stop)
        try:
            code = main(words)
        except _Parsed as stopped:
            (parsed,) = stopped.args
        else:
            pytest.fail(f"{shown}\nis refused with exit code {code}: {errors.getvalue()}")
    if hasattr(parsed, "config"):
        try:
            validate(parsed.config)
        except ValueError as error:
            pytest.fail(f"{shown}\nis refused: {error}")
    return parsed

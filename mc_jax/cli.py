"""The program `mc-jax`: picks the command, and ends a mistake with one line and exit code 2."""

# What takes long is imported later: until `main` begins, Ctrl-C ends in a traceback.
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from mc_jax import stop_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mc-jax ARGUMENTS` and return its exit code.

    Args:
      arguments: the words after the program's name; None takes them from the command line, and listens to
        signals until the program ends.

    Returns:
      0; 2 after a mistake of the user, told in one line on stderr; 130 after Ctrl-C; 141 after a closed pipe.
    """
    if arguments is None:
        stop_signals.StopSignals().__enter__()
    # With JAX's own frames in it, a traceback tells whose error it is.
    os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
    words = list(sys.argv[1:] if arguments is None else arguments)
    signals = stop_signals.current()
    try:
        _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        if not _speaks_to_the_user(error):
            signals.end_soon(1)
            raise
        signals.give_way()
        print(f"mc-jax: error: {' '.join(_message(error).split())}", file=sys.stderr)
        signals.end_soon(2)
        return 2
    except Exception:
        signals.end_soon(1)
        raise
    signals.end_at_once("interrupted at its end")
    return 0 if signals.heard is None else signals.code


def _dispatch(words: list[str]) -> None:
    from mc_jax._absent_tpu import quiet_libtpu
    from mc_jax._arguments import UsageError, did_you_mean
    from mc_jax._commands import COMMANDS, ELSEWHERE

    quiet_libtpu()
    if not words or words[0] in ("-h", "--help"):
        print(_overview(COMMANDS))
        return
    name, *rest = words
    if name in ELSEWHERE:
        raise UsageError(f"there is no command {name!r}; did you mean {ELSEWHERE[name]}?")
    if name not in COMMANDS:
        raise UsageError(
            f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; known are {', '.join(COMMANDS)}"
        )
    COMMANDS[name](rest)


def _overview(commands: Mapping[str, Callable[..., None]]) -> str:
    lines = [f"  {name:13}{(run.__doc__ or '').partition('\n')[0]}" for name, run in commands.items()]
    return "\n".join(
        [
            "usage: mc-jax COMMAND ...",
            "",
            "Recurrent language models with growing memory (Memory Caching).",
            "",
            "commands:",
            *lines,
            "",
            "mc-jax COMMAND --help tells a command's options.",
        ]
    )


def _speaks_to_the_user(error: Exception) -> bool:
    """Whether the error was raised on purpose, with a message: by this code, or by a file system.

    A ValueError out of a library that was called wrongly is a defect, and keeps its traceback.
    """
    import traceback
    from pathlib import Path

    if isinstance(error, OSError):
        return True
    own_folders = {Path(__file__).parent, Path(__file__).parents[1] / "pallas_kernels"}
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return not own_folders.isdisjoint(raised_in.parents)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

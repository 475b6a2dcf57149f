"""The program of lm-eval, which knows the model `mc_jax` here: python -m mc_jax.evaluation.harness --help."""

import os
import sys

from mc_jax._absent_tpu import quiet_libtpu


def main(arguments: list[str] | None = None) -> int:
    """Run lm-eval's program with these words, or those of the command line, and return its exit code."""
    quiet_libtpu()
    # lm-eval's bootstrap forks, which a process with JAX's threads may not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if arguments is not None:
        sys.argv[1:] = arguments
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError:
        print("error: lm-eval is not installed: scripts/setup eval", file=sys.stderr)
        return 2
    from mc_jax.evaluation.harness import model  # registers it

    assert model.NAME
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

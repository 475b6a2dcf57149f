"""A model of rows of 2,048 tokens that goes on with rows of 16,384: its caches read whole, or the best 4.

The quickstart with rows of one part of a novel, then a fifth of its tokens from there: in rows as short, in
long ones of which each token reads all cached memories, and in long ones that read the four best-scored.
Three seeds take an hour on one core.
"""

from experiments.studies import Study

_SHORT = ("--data.context-length", "2048", "--training.batch-size", "1", "--evaluation.batch-size", "2")
_LONG = ("--data.context-length", "16384", "--training.batch-size", "1", "--evaluation.batch-size", "1")
_RATE = ("--training.learning-rate", "2e-3")


def study() -> Study:
    """All are read at both lengths, by position: whole, the best four, and with their caches off."""
    return Study(
        recipe="quickstart",
        variants={
            "base": _SHORT,
            "short": (*_SHORT, *_RATE, "--training.steps", "88", "--training.warmup-steps", "8"),
            "long": (*_LONG, *_RATE, "--training.steps", "11", "--training.warmup-steps", "1"),
            "sparse": (
                *_LONG,
                *_RATE,
                *("--training.steps", "11", "--training.warmup-steps", "1"),
                *("--model.aggregation", "sparse", "--model.top-k", "4"),
            ),
        },
        begins_with=dict.fromkeys(("short", "long", "sparse"), "base"),
        sweep=(
            *("--mode", "by-position", "--context-length", "2048", "16384"),
            *("--aggregation", "gated", "sparse", "none", "--top-k", "4"),
        ),
    )

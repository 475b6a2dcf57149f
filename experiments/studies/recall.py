"""What ways to read cached memories recall, beside a recurrence alone: the recipe `recall`, trained alike.

All have as many parameters: where there is no router, the MLP is wider by what its maps take.
"""

from experiments.studies import Study

_WIDER = ("--model.mlp-dim", "172")


def study() -> Study:
    """The variants are read as they were trained and with their caches off, by position too."""
    return Study(
        recipe="recall",
        variants={
            "none": ("--model.aggregation", "none", "--model.segment-init", "checkpoint", *_WIDER),
            "gated": (),
            "null": ("--model.aggregation", "null"),
        },
        sweep=("--mode", "windows", "by-position", "--aggregation", "none"),
    )

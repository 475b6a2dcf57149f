"""What cached memories are worth to the quickstart: ways to read them, none, and attention, trained alike.

Three seeds take two and a half hours on two cores.
"""

from experiments.studies import Study


def study() -> Study:
    """The variants are read as they were trained and with their caches off, by position too."""
    return Study(
        recipe="quickstart",
        variants={
            "none": ("--model.aggregation", "none"),
            "gated": (),
            "sparse": ("--model.aggregation", "sparse", "--model.top-k", "2"),
            "null": ("--model.aggregation", "null"),
            "residual": ("--model.aggregation", "residual"),
            "attention": ("--model.layer-pattern", "attention"),
        },
        sweep=("--mode", "windows", "by-position", "--aggregation", "none"),
    )

"""What a plan calls the parts of a step is told by classes, functions and files that are there."""

import pathlib
import re
from collections.abc import Iterator

import jax.experimental.pallas.ops.tpu.splash_attention as splash_attention
import optax
import pytest

from mc_jax.planning import parts

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWN = [file for folder in ("mc_jax", "pallas_kernels") for file in (ROOT / folder).rglob("*.py")]
FOREIGN = [pathlib.Path(package.__file__) for package in (optax, splash_attention) if package.__file__]


def alternatives(pattern: str) -> Iterator[str]:
    """All that a pattern of literals, "(a|b)" and "a|b" stands for."""
    group = re.search(r"\(([^()]*)\)", pattern)
    if group is None:
        yield from pattern.split("|")
        return
    for choice in group[1].split("|"):
        yield from alternatives(pattern[: group.start()] + choice + pattern[group.end() :])


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in parts._FILES])
def test_every_file_that_tells_a_part_is_there(pattern):
    paths = [f"/{file.relative_to(ROOT)}" for file in OWN] + [str(file) for file in FOREIGN]
    for one in alternatives(pattern):
        assert any(one in path for path in paths), f"no file is like {one!r}: what moved lands in no part"


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in parts._FUNCTIONS])
def test_every_function_that_tells_a_part_is_there(pattern):
    source = "\n".join(file.read_text(encoding="utf-8") for file in OWN)
    for one in alternatives(pattern):
        name = one.removesuffix(r"\b").split(r"\.")[-1]
        assert re.search(rf"(class|def) {name}\b", source), (
            f"nothing is called {name}: what it did lands in no part"
        )

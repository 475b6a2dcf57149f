"""What a plan calls the parts of a step is told by classes, functions and files that are there."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax.experimental.pallas.ops.tpu.splash_attention as splash_attention
import optax
import pytest

from mc_jax.planning import parts
from mc_jax.planning.program import Frame, Operation

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


def operation(name: str, **facts: Any) -> Operation:
    plain: dict[str, Any] = {
        "kind": "fusion",
        "shape": "",
        "source": "",
        "times": 1,
        "cycles": 1,
        "is_kernel": False,
    }
    return Operation(**(plain | {"name": name} | facts))


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (operation("splash_mha_fwd_segmented_residuals.2", is_kernel=True), "attention"),
        (operation("copy.7"), parts.COMPILER),
        (operation("new_kernel.1", is_kernel=True), parts.UNKNOWN),
        (operation("fusion.3", source="jit(step)/add"), parts.UNKNOWN),
        (operation("fusion.4", frames=(Frame(file="/elsewhere.py", function="new"),)), parts.UNKNOWN),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_what_has_no_source_is_told_from_what_the_tables_lack(found, part):
    assert parts.operation_part(found) == part

"""What both sides of scripts/gpu_check measure, and on which numbers.

Shapes: B batch, T tokens, H heads, K key dim (and value dim).
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MEMORIES = ("linear", "delta", "titans")
AGGREGATIONS = ("none", "gated", "sparse")
TOP_K = 2
ALLOWED = (2e-2, 4e-2)
"""Root mean squares of differences from the reference, over its own: of reads, of gradients; in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows of tokens that a layer is run on."""

    rows: int
    tokens: int
    heads: int = 8
    dim: int = 128
    segment: int = 256
    chunk: int = 64

    @property
    def name(self) -> str:
        """Rows and tokens."""
        return f"{self.rows} x {self.tokens:,}"


def sizes(quick: bool) -> dict[str, Size]:
    """Return sizes by name: as many tokens in all."""
    if quick:
        tiny = {"heads": 2, "dim": 16, "segment": 16, "chunk": 8}
        return {"4K": Size(rows=2, tokens=64, **tiny), "32K": Size(rows=1, tokens=128, **tiny)}
    return {"4K": Size(rows=8, tokens=4096), "32K": Size(rows=1, tokens=32_768)}


def arguments(size: Size, memory: str, aggregation: str, array: Callable[[str], Any]) -> dict[str, Any]:
    """Return a layer's arguments and `target`, which weighs its reads; `array` makes one by its name."""
    names = ["q", "k", "v", "target", "retention", "step"]
    names += ["momentum"] if memory == "titans" else []
    names += ["u", "online_logit"] if aggregation != "none" else []
    found = {name: array(name) for name in names}
    if memory == "titans":  # a chunk of tokens is one gradient step
        found["step"] = found["step"] / (2 * size.chunk)
    return found


_RANGES = {"retention": (0.99, 1), "step": (0.1, 1), "momentum": (0.3, 0.6), "online_logit": (-1, 1)}
_NORMAL = ("q", "k", "v", "target", "u", "states")


@functools.cache
def drawn(size: Size, name: str) -> np.ndarray:
    """Return random numbers in float32: [B, T, H, K], coefficients [B, T, H], gates [B, T, H, N], states."""
    shape = (size.rows, size.tokens, size.heads)
    segments = size.tokens // size.segment
    random = np.random.default_rng((*_NORMAL, *_RANGES, "gates").index(name))
    if name in _RANGES:
        return random.uniform(*_RANGES[name], shape).astype(np.float32)
    if name == "gates":
        readable = np.arange(segments) < np.arange(size.tokens)[:, None] // size.segment
        return random.random((*shape, segments), np.float32) * readable[None, :, None]
    states = (size.rows, segments, size.heads, size.dim, size.dim)
    found = random.standard_normal(states if name == "states" else (*shape, size.dim), np.float32)
    if name in ("q", "k"):
        found /= np.linalg.norm(found, axis=-1, keepdims=True)
    return 4 * found if name == "u" else found


def root_mean_square(found: np.ndarray, expected: np.ndarray, *, left_out: float = 0.0) -> float:
    """Return the differences' root mean square over the expected one's.

    `left_out` is a share of tokens [T, ...], the worst ones: what chooses among all but equal scores may
    choose otherwise where it rounds otherwise.
    """
    wide, wide_expected = (np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in (found, expected))
    squares = np.sort(np.sum((wide - wide_expected) ** 2, axis=1))
    # A NaN is sorted last, and must not be left out.
    if not np.isfinite(squares).all():
        return float("nan")
    kept = squares[: max(1, round(len(squares) * (1 - left_out)))]
    return float(np.sqrt(np.sum(kept) / (np.sum(wide_expected**2) + 1e-30)))


def compared(folder: pathlib.Path, name: str, found: dict[str, np.ndarray]) -> dict:
    """Compare the first row and head of reads "y" [T, V] and gradients with a reference that was saved.

    Without one there is nothing to say; with one, the largest differences, and whether they are allowed.
    """
    file = folder / f"{name}.npz"
    if not all(np.isfinite(x).all() for x in found.values()):
        return {"agrees": False, "difference": float("nan")}
    if not file.exists():
        return {}
    # Nearly equal scores are chosen among otherwise where they round otherwise.
    left_out = 0.05 if "sparse" in name else 0.0
    expected = np.load(file)
    differences = {
        key: root_mean_square(found[key], expected[key], left_out=left_out)
        for key in expected.files
        if key in found
    }
    reads, bars = differences.pop("y"), differences
    result = {"difference": reads, "agrees": reads <= ALLOWED[0]}
    if bars:
        result["gradient_difference"] = max(bars.values())
        result["agrees"] = result["agrees"] and result["gradient_difference"] <= ALLOWED[1]
    return result


def median_milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict:
    """Time a run that was warmed up: five times as many runs in a row as take a part of `seconds`."""

    def several(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            found = run()
        wait(found)
        return (time.perf_counter() - begin) / count

    several(1)
    count = max(1, min(50, int(seconds / 6 / max(several(1), 1e-6))))
    times = [1e3 * several(count) for _ in range(5)]
    return {"milliseconds": statistics.median(times), "least": min(times), "most": max(times)}


def is_wanted(what: str, only: list[str]) -> bool:
    """Whether one of these texts is in a name; without any, all are wanted."""
    return not only or any(text in what for text in only)


def say(row: dict) -> None:
    """Hand a row to the program that collects them."""
    sys.stdout.write("ROW " + json.dumps(row) + "\n")
    sys.stdout.flush()


def one_line(error: BaseException) -> str:
    """Return what went wrong, on a line of a table."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words[:160].replace("|", "/")

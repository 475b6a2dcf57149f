"""FLOPs of a program's matrix products, read off the lines of its text.

The TPU's compiler writes every product as a convolution. A product for each of N pairs of matrices is one
over a dimension of N places, with windows and dilations such that each place meets its own partner alone: so
the pairs of places that do meet are counted.
"""

import math
import re

_CONVOLUTION = re.compile(r" = (?P<shape>\S+) convolution\(%?(?P<left>[\w.\-]+), %?(?P<right>[\w.\-]+)\)")
_DOT = re.compile(r" = (?P<shape>\S+) dot\(%?(?P<left>[\w.\-]+), %?(?P<right>[\w.\-]+)\)")
_LABELS = re.compile(r"dim_labels=(?P<left>\w+)_(?P<right>\w+)->(?P<out>\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def products_of(line: str, shapes: dict[str, str]) -> float:
    """FLOPs of the product that an operation is; 0 if it is none.

    Args:
      line: of a program's text.
      shapes: of the results of the operations beside it, by name.
    """
    if found := _CONVOLUTION.search(line):
        return _convolution(line, *(_dims(text) for text in _shapes_of(found, shapes)))
    if found := _DOT.search(line):
        out, left, _ = (_dims(text) for text in _shapes_of(found, shapes))
        contracted = _CONTRACTED.search(line)
        numbers = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[n] for n in numbers)
    return 0.0


def _shapes_of(found: re.Match, shapes: dict[str, str]) -> tuple[str, str, str]:
    return found["shape"], shapes[found["left"]], shapes[found["right"]]


def _dims(shape: str) -> list[int]:
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    assert found is not None, shape
    return [int(n) for n in found[1].split(",") if n]


def _convolution(line: str, out: list[int], left: list[int], right: list[int]) -> float:
    labels = _LABELS.search(line)
    assert labels is not None, line
    spatial = sorted(set(labels["out"]) - set("bf"))
    window = _WINDOW.search(line)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    flops = (
        2.0
        * out[labels["out"].index("b")]
        * out[labels["out"].index("f")]
        * right[labels["right"].index("i")]
    )
    for place, dim in enumerate(spatial):

        def field(name: str, default: int, place=place) -> int:
            return int(fields[name].split("x")[place]) if name in fields else default

        low = int(fields["pad"].split("x")[place].split("_")[0]) if "pad" in fields else 0
        flops *= _meetings(
            left[labels["left"].index(dim)],
            right[labels["right"].index(dim)],
            out[labels["out"].index(dim)],
            stride=field("stride", 1),
            low=low,
            left_dilation=field("lhs_dilate", 1),
            right_dilation=field("rhs_dilate", 1),
        )
    return flops


def _meetings(
    left: int, right: int, out: int, *, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """How many pairs of a place and a tap meet something that is not padding."""
    count = 0
    for tap in range(right):
        start = tap * right_dilation - low
        if left_dilation == 1:
            first = max(0, -(start // stride)) if start < 0 else 0
            last = min(out - 1, (left - 1 - start) // stride)
            count += max(0, last - first + 1)
        else:
            places = (start + stride * place for place in range(out))
            count += sum(0 <= at < left * left_dilation and at % left_dilation == 0 for at in places)
    return count

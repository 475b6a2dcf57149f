"""What the kernels cost on TPUs that are not here, by the schedules and estimates of their compiler.

A bundle is what a core issues in one cycle; a kernel's bundles are its time if it never waits for memory.
What XLA makes of an op has estimates in cycles. Both are static: ratios on one chip tell more than cycles.

"streaming" charges a kernel's copies from and to HBM at the rate that XLA's estimates grant operations that
stream, "peak" at the chip's peak. Blocks that stay where they are from one step of a grid to the next are not
copied again. The sparse read's loops turn as data tell, and count as its kernels expect: by pairs choices are
spread evenly, by unions they agree as a trained model's do. XLA's sorts, of which the read by pairs has one,
have no estimate and count for nothing.

The bound is the larger of the matrix products at the chip's peak and of reading arguments and writing results
once at the peak of HBM. Arguments and results have whatever layouts suit: in a model, the operations around
an op take on the layouts it asks for.
"""

import argparse
import json
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

from mc_jax.planning.cost import cost_of, keep_schedules  # noqa: E402 (after the path is set)

keep_schedules()

import _kernel_cases as cases  # noqa: E402 (after libtpu was told to write schedules)
import _layer_cases as layers  # noqa: E402

BUDGETS = _ROOT / "pallas_kernels/budgets.json"
_CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
_LENGTHS = (4096, 32768, 131072)


def bundles(chip: str, name: str) -> dict[str, float]:
    """Return the bundles per token and head of an op's kernels at its case's size, by "op: kernel"."""
    case = cases.CASES[name](cases.TOKENS)
    function, shapes = case.whole("tpu")
    found = {}
    for kernel in cost_of(chip, function, *shapes, donated=case.donated).kernels:
        key = f"{name}: {kernel.name}"
        found[key] = found.get(key, 0.0) + kernel.calls * kernel.bundles / case.token_heads
    return {key: round(value, 3) for key, value in found.items()}


def record(chips: list[str], ops: list[str] | None) -> None:
    """Write the budgets that a test holds the kernels to; those of other chips, and other ops, stay."""
    for chip in chips:
        found = {key: value for name in ops or cases.CASES for key, value in bundles(chip, name).items()}
        budgets = json.loads(BUDGETS.read_text())
        stay = budgets.get(chip, {}) if ops else {}
        budgets[chip] = dict(sorted((stay | found).items()))
        BUDGETS.write_text(json.dumps(budgets, indent=2) + "\n")
        print(f"wrote {BUDGETS.relative_to(_ROOT)}: {chip}", flush=True)


def print_ops(chips: list[str], ops: list[str] | None, *, xla: bool) -> None:
    """Print every op beside XLA's version of it and beside its bound."""
    for chip in chips:
        print(f"\n{chip}: {cases.TOKENS:,} tokens, bfloat16; cycles in millions; bundles per token and head")
        print(
            f"{'':<34}{'bundles':>9}{'streaming':>11}{'peak':>8}{'bound':>8}{'XLA':>9}{'XLA/ours':>10}"
            f"{'ours/bound':>12}"
        )
        for name in ops or cases.CASES:
            case = cases.CASES[name](cases.TOKENS)
            print_row(f"{name}, forward", case, case.forward, case.shapes, 1, chip, xla)
            if case.has_gradient:
                print_row(f"{name}, and backward", case, case.both, (case.bars, *case.shapes), 3, chip, xla)


def print_row(name: str, case: cases.Case, function, shapes, products: int, chip: str, xla: bool) -> None:
    """Print one op; `products` is how often its matrix products are made, forward and backward."""
    ours = cost_of(chip, function("tpu"), *shapes, donated=case.donated)
    bound = max(
        products * case.products / ours.chip.flops_per_cycle,
        products * case.bytes / ours.chip.bytes_per_cycle,
    )
    row = (
        f"{name:<34}{ours.bundles / case.token_heads:>9.2f}{ours.cycles / 1e6:>11.2f}"
        f"{ours.cycles_at_peak / 1e6:>8.2f}{bound / 1e6:>8.2f}"
    )
    if xla:
        theirs = cost_of(chip, function("xla"), *shapes, donated=case.donated)
        row += f"{theirs.cycles / 1e6:>9.2f}{theirs.cycles / ours.cycles:>10.1f}"
    else:
        row += f"{'':>19}"
    print(f"{row}{ours.cycles_at_peak / bound:>12.2f}", flush=True)


def print_layers(chips: list[str], lengths: list[int]) -> None:
    """Print a layer's kernels beside splash attention, a token and head."""
    for chip in chips:
        print(f"\n{chip}: a layer's kernels beside splash attention; a token and head, bfloat16, dims of 128")
        print(
            f"{'':<46}{'bundles':>9}{'streaming':>11}{'peak':>8}{'of XLA':>8}"
            "   splash / ours: bundles, streaming, peak"
        )
        for tokens in lengths:
            for backward in (False, True):
                print_layer_rows(chip, tokens, backward)


def print_layer_rows(chip: str, tokens: int, backward: bool) -> None:
    """Print all layers at one length."""
    what = "and backward" if backward else "forward"
    attention = None
    for layer in layers.layers(tokens, backward=backward):
        case = layer.case
        function, shapes = case.whole("tpu") if backward else (case.forward("tpu"), case.shapes)
        cost = cost_of(chip, function, *shapes)
        figures = layer.figures(cost)
        attention = attention or figures
        ratios = "".join(f"{a / b:>9.1f}" for a, b in zip(attention[:3], figures[:3], strict=True))
        row = "".join(f"{figure:>{width}.2f}" for figure, width in zip(figures, (9, 11, 8, 8), strict=True))
        print(f"{f'{layer.name}, {tokens:,}, {what}':<46}{row}{ratios}", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench_kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", nargs="+", choices=_CHIPS, default=list(_CHIPS))
    parser.add_argument(
        "--without-xla", action="store_true", help="leave XLA's versions out: they compile long"
    )
    parser.add_argument("--ops", nargs="+", choices=cases.CASES, help="those alone, in a table or a record")
    parser.add_argument(
        "--record", action="store_true", help="write these chips' pallas_kernels/budgets.json, and no table"
    )
    parser.add_argument(
        "--layers",
        nargs="*",
        type=int,
        metavar="TOKENS",
        help="print a layer's kernels beside splash attention at these lengths, and no other table",
    )
    parser.add_argument(
        "--bundles", choices=_CHIPS, help="print one chip's bundles as JSON, a line an op, and no table"
    )
    arguments = parser.parse_args()
    if arguments.bundles:
        for name in arguments.ops or cases.CASES:
            print(json.dumps({"op": name, "bundles": bundles(arguments.bundles, name)}), flush=True)
    elif arguments.record:
        record(arguments.chips, arguments.ops)
    elif arguments.layers is not None:
        print_layers(arguments.chips, arguments.layers or list(_LENGTHS))
    else:
        print_ops(arguments.chips, arguments.ops, xla=not arguments.without_xla)


if __name__ == "__main__":
    main()

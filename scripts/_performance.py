"""Plan the paper's recipes on TPUs that are not here, and write docs/performance.md.

Each plan is a process of its own and takes minutes. Its result is kept in build/performance, with the commit
that it is of, so a run that was broken off goes on; --again makes all anew.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "build/performance"
_PAGE = _ROOT / "docs/performance.md"

_MODELS = ("linear-gated", "linear-sparse", "titans-gated", "transformer")
# Of 16 chips: compiling for more takes longer, and tells the same but for what is sent.
_TARGETS = ("v5p:2x2x4", "v5e:4x4", "v6e:4x4")
# Tokens of a row, rows on 16 chips, and the lightest remat that all of the models fit with.
_LENGTHS = {"4K": (4096, 32, "maps"), "32K": (32_768, 16, "maps"), "128K": (131_072, 16, "states")}
_READS = ("linear-none", "linear-gated", "linear-sparse", "linear-null", "transformer")
# What maps of a model with MLP memories return is too much to keep for these.
_SMALL = ("v5e:4x4",)


def _cases() -> dict[str, list[str]]:
    """By what a row of the table is called: arguments of `mc-jax plan`."""
    found = {}
    for topology in _TARGETS:
        for model in _MODELS:
            found[f"{model}, {topology}"] = [
                *(f"paper-1.3b-{model}", "--topology", topology, "--training.batch-size", "32"),
                *(("--training.remat", "states") if "titans" in model and topology in _SMALL else ()),
            ]
    found["linear-gated, v5p:4x4x4"] = ["paper-1.3b-linear-gated", "--topology", "v5p:4x4x4"]
    found["linear-gated, v5p:4x8x8"] = [
        *("paper-1.3b-linear-gated", "--topology", "v5p:4x8x8"),
        *("--training.batch-size", "512"),
    ]
    found["linear-gated, 2 slices of v5p:2x2x4"] = [
        *("paper-1.3b-linear-gated", "--topology", "v5p:2x2x4", "--slices", "2"),
        *("--training.batch-size", "64"),
    ]
    for topology, rows in (("v5p:2x2x4", 16), ("v5e:4x4", 16)):
        found[f"linear-sparse, 32K context, {topology}"] = [
            *("paper-1.3b-linear-sparse", "--topology", topology),
            *("--data.context-length", "32768", "--training.batch-size", str(rows)),
            *("--training.remat", "blocks"),
        ]
    return found


def _lengths() -> dict[str, list[str]]:
    """As `_cases`, of the second table."""
    return {
        f"{model}, {length}": [
            *(f"paper-1.3b-{model}", "--topology", "v5p:2x2x4", "--data.context-length", str(tokens)),
            *("--training.batch-size", str(rows), "--training.remat", remat),
        ]
        for length, (tokens, rows, remat) in _LENGTHS.items()
        for model in _READS
    }


def _commit() -> str:
    git = ("git", "rev-parse", "--short", "HEAD")
    return subprocess.run(git, capture_output=True, text=True, check=True, cwd=_ROOT).stdout.strip()


def _file(name: str) -> Path:
    return _RESULTS / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _kept(name: str, arguments: list[str]) -> dict | None:
    """What was planned last, with the commit that it is of."""
    found = json.loads(_file(name).read_text()) if _file(name).exists() else None
    return found if found and found["arguments"] == arguments else None


def _plan(name: str, arguments: list[str]) -> bool:
    """Whether it went well."""
    print(f"{name} ...", flush=True)
    commit = _commit()  # the work may go on meanwhile
    command = [sys.executable, "-m", "mc_jax.cli", "plan", *arguments, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if run.returncode:
        print(run.stderr[-2000:], file=sys.stderr)
        return False
    _RESULTS.mkdir(parents=True, exist_ok=True)
    _file(name).write_text(
        json.dumps({"commit": commit, "arguments": arguments, "plan": json.loads(run.stdout)})
    )
    return True


def _row(name: str, found: dict) -> str:
    plan, commit = found["plan"], found["commit"]
    memory = plan["memory"]
    held = f"{memory['total'] / 1e9:.1f} of {memory['capacity'] / 1e9:.1f}"
    speed = plan["speed"]
    if speed is None:
        return f"| {name} | {plan['rows']} | {plan['remat']} | {held}: does not fit | | | | | {commit} |"
    # As the step would take if all that is sent overlapped, or nothing.
    most, least = (
        100 * speed["mfu"] * speed["seconds"] / speed[f"{end}_seconds"] for end in ("least", "most")
    )
    return (
        f"| {name} | {plan['rows']} | {plan['remat']} | {held} | {speed['seconds']:.3f} "
        f"| {speed['tokens_per_second'] / plan['chips']:,.0f} | {100 * speed['mfu']:.1f} "
        f"| {least:.1f} to {most:.1f} | {commit} |"
    )


_HEAD = """# Performance by plan

Every figure here is an **estimate** of the TPU's compiler, made by `mc-jax plan` on a machine without a
TPU: no chip has run any of it. HBM is what the compiled program asks for. Times are the compiler's cycles,
where kernels enter with their schedules' bundles and what streams from HBM is charged at some 40 % of its
peak. What chips send to each other takes as long as its bytes over the vendor's bandwidth, from where the
program begins it, and the program goes on until it waits for it; the range is what it would be if nothing
that is sent overlapped with computing, or all. MFU is FLOPs by formula (cached reads included, what is
computed again left out) over the chips' peak.

The models have 1.3 B parameters and rows of 4,096 tokens, if nothing else is said. `scripts/performance`
writes this page; one line of it is, for example,

```sh
source .venv/bin/activate
mc-jax plan paper-1.3b-linear-gated --topology v5p:4x4x4
```

The recipe's batch is 128 rows, two for each of 64 chips. On 16 chips the table has as many a chip. What 16,
64 and 256 chips of a v5p differ in is what weak scaling loses. Slices send each other their gradients over
the data center's network. Sparse reads of 32K are reckoned as if neighbouring tokens agreed on states as
those of a small trained model do.

| model, topology | rows a chip | remat | HBM, GB | step, s | tokens/s a chip | MFU, % | range | commit |
|---|---|---|---|---|---|---|---|---|
"""

_BY_LENGTH = """
## By the length of rows

What reads cost beside a transformer: the same models on a v5p:2x2x4, segments of 256 tokens (sparse reads
two), each with the lightest recomputation that fits. Of 4K there are two rows on a chip, else one. Rows
of the table that are missing have not been planned: compiling one takes two to four minutes of a core.

| model, tokens a row | rows a chip | remat | HBM, GB | step, s | tokens/s a chip | MFU, % | range | commit |
|---|---|---|---|---|---|---|---|---|
"""

_GPUS = """
## On a GPU

No GPU has run any of this yet: none was at hand. On one H100 or H200, within eight minutes and without
internet, with the JAX (0.11.2 or later), Flax and Optax that the machine has, and PyTorch if it is there,

```sh
scripts/gpu_check
```

prints the table for this page, and keeps it with all numbers in `build/gpu_check` (`--output FOLDER`). It
compares every operation with its plain reference; then layers of linear, delta and titans memories, read
alone, gated and sparse, 8 rows of 4,096 tokens and one of 32,768 (8 heads of 128, segments of 256, bfloat16,
forward and backward): XLA's forms and the Mosaic GPU read, beside the same in PyTorch, eager and compiled;
and a training step of `paper-170m-linear-gated`, its whole batch of 128 rows. Each row says whether its
numbers agree with the reference. What fails, or has no time left, is a line of the table, and the rest goes
on; the same command again finds what was compiled. `--only TEXT` measures a part, `--quick` tries the script
on a CPU.

Compiled for an H100 that is not here (jaxlib 0.11.2 with CUDA 13, no autotuning), temporaries in GB:

| forward and backward, 8 heads of 128 | 8 rows of 4,096 tokens | 1 row of 32,768 |
|---|---|---|
| linear, none | 1.60 | |
| linear, gated | 1.78 | |
| delta, gated | 3.91 | 1.38 |
| titans, gated | | 1.44 |
| linear, sparse | 1.87 | 1.73 |
| linear, sparse, all states read | | 1.27 |

The training step needs 16.2 GB of temporaries for 8 rows at a time and 2.05 GB of state; with titans (an MLP)
for 4 rows at a time 13.1 GB.
"""


def _write() -> None:
    """Write the page with all that has been planned: rows that are there and not planned here stay."""
    before = {line.split(" | ")[0].removeprefix("| "): line for line in _PAGE.read_text().splitlines()}

    def rows(cases: dict[str, list[str]]) -> str:
        planned = {name: _kept(name, arguments) for name, arguments in cases.items()}
        lines = [_row(name, one) if one else before.get(name) for name, one in planned.items()]
        return "".join(f"{line}\n" for line in lines if line)

    _PAGE.write_text(_HEAD + rows(_cases()) + _BY_LENGTH + rows(_lengths()) + _GPUS)


def main() -> int:
    """Plan what is asked for and not there yet, and write the page."""
    parser = argparse.ArgumentParser(prog="scripts/performance", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="plan those whose names have this in them")
    parser.add_argument("--again", action="store_true", help="plan what has been planned, too")
    chosen = parser.parse_args()
    failed = []
    for name, arguments in (_cases() | _lengths()).items():
        if chosen.only in name and (chosen.again or _kept(name, arguments) is None):
            failed += [] if _plan(name, arguments) else [name]
            _write()
    _write()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

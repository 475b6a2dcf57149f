"""Check and measure this package on one GPU, beside PyTorch: a table and JSON, in at most eight minutes.

Each part is a process of its own, so that a kernel that hangs or spoils the GPU takes nothing with it. After
every row gpu_check.json and gpu_check.md are written anew in the folder --output: what was measured stays.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "torch", "triton")
_SECONDS = 465
# Parts with the seconds that each may take, beside what those before it have left over. What matters most is
# first; what no GPU has run yet, and so may hang, has the GPU after what is known.
_PARTS = (
    ("selftest", ("_gpu_check_jax.py", "selftest"), 75),
    ("4K", ("_gpu_check_jax.py", "4K"), 80),
    ("32K", ("_gpu_check_jax.py", "32K"), 80),
    ("step", ("_gpu_check_jax.py", "step"), 105),
    ("Mosaic GPU", ("_gpu_check_jax.py", "mosaic"), 40),
    ("PyTorch, eager", ("_gpu_check_torch.py", "eager"), 35),
    ("PyTorch, compiled", ("_gpu_check_torch.py", "compiled"), 50),
)
# One process imports once.
_QUICK_PARTS = (
    ("JAX", ("_gpu_check_jax.py", "selftest", "4K", "32K", "step", "mosaic"), 150),
    ("PyTorch, eager", ("_gpu_check_torch.py", "eager"), 60),
    ("PyTorch, compiled", ("_gpu_check_torch.py", "compiled"), 150),
)
_GRACE = 5.0
_CACHE = pathlib.Path(tempfile.gettempdir()) / "gpu_check_compiled"


class Report:
    """What was found so far, and the files that hold it."""

    def __init__(self, folder: pathlib.Path, header: dict[str, Any]) -> None:
        """Begin in a folder, with nothing measured."""
        self._folder = folder
        self.header = header
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, tell of it, and write both files."""
        self.rows.append(row)
        names = [row[name] for name in ("part", "what", "size", "dtype", "path") if name in row]
        print(f"{', '.join(names)}: {_words(row)}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write both files anew, each at once."""
        found = _without_nans({**self.header, "rows": self.rows})
        for name, text in (("gpu_check.json", json.dumps(found, indent=1)), ("gpu_check.md", self.table())):
            unfinished = self._folder / f"{name}.partial"
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(self._folder / name)

    def table(self) -> str:
        """Return the page: header, selftest, times."""
        lines = [f"# {self.header['card']}", ""]
        lines += [f"- {name}: {value}" for name, value in self.header.items() if name != "card"]
        tests = [row for row in self.rows if row["part"] == "selftest" or "dtype" in row]
        timed = [row for row in self.rows if row not in tests]
        if tests:
            bad = [row for row in tests if not row.get("agrees")]
            lines += ["", f"Selftest: {len(tests) - len(bad)} of {len(tests)} agree with the reference."]
            lines += [f"- {row['what']}, {row.get('path')}, {row.get('dtype')}: {_words(row)}" for row in bad]
        if timed:
            lines += [
                *(
                    "",
                    "Forward and backward, bfloat16, if nothing else is said; memory of a program as planned",
                ),
                "by XLA, of PyTorch and of the training step as allocated at most; differences from the",
                "reference, of reads and of gradients, relative to it (root mean squares).",
                "",
                "| what | rows x tokens | path | ms | tokens/s | first run, s | memory, GB | differences |",
                "|---|---|---|---|---|---|---|---|",
            ]
            order = {key: place for place, key in enumerate(dict.fromkeys(map(_key, timed)))}
            lines += [_line(row) for row in sorted(timed, key=lambda row: order[_key(row)])]
        return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple:
    return row.get("what", ""), row.get("size", "")


def _line(row: dict[str, Any]) -> str:
    head = f"| {row.get('what', row['part'])} | {row.get('size', '')} | {row.get('path', '')} "
    if "milliseconds" not in row:
        return head + f"| {_words(row)} | | | | |"
    memory = row.get("peak_bytes") or row.get("planned_bytes") or row.get("peak_bytes_of_process")
    memory = "" if memory is None else f"{memory / 1e9:.2f}"
    return head + (
        f"| {row['milliseconds']:.2f} | {row['tokens_per_second']:,.0f} | {row['compile_seconds']:.1f} "
        f"| {memory} | {_agreement(row)} |"
    )


def _agreement(row: dict[str, Any]) -> str:
    numbers = [row[name] for name in ("difference", "gradient_difference") if row.get(name) is not None]
    if "losses" in row:
        words = "loss " + " to ".join(f"{row['losses'][place]:.3f}" for place in (0, -1))
        words += f"; {row['teraflops_by_formula']:.0f} TFLOP/s"
    else:
        words = ", ".join(f"{number:.1e}" for number in numbers) or "not compared"
    words += "; while others were compiled" if row.get("beside_compiling") else ""
    return words if row.get("agrees", True) else f"DIFFERS: {words}"


def _words(row: dict[str, Any]) -> str:
    """What came of it, without what it is."""
    for word in ("failed", "skipped"):
        if word in row:
            return f"{word}: {row[word]}"
    speed = f"{row['milliseconds']:.2f} ms; " if "milliseconds" in row else ""
    return speed + _agreement(row)


def _without_nans(tree: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(tree, dict):
        return {key: _without_nans(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nans(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=_ROOT, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return done or None


def header(quick: bool) -> dict[str, Any]:
    """Return card, driver, versions, commit."""
    gpu = _answer("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    card, driver, memory = gpu.splitlines()[0].split(", ") if gpu else (None, None, None)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    changed = " with changes" if _answer("git", "status", "--porcelain", "--untracked-files=no") else ""
    commit = _answer("git", "rev-parse", "--short", "HEAD")
    return {
        "card": card or "no GPU",
        "driver": driver,
        "memory": memory,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": sys.version.split()[0],
        "commit": f"{commit}{changed}" if commit else "unknown (no git here)",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"sizes": "tiny (--quick): these times mean nothing"} if quick else {}),
    }


def run_part(report: Report, name: str, command: list[str], seconds: float, log: pathlib.Path) -> None:
    """Run a process, add its rows, and end it when its time is over."""
    until = time.monotonic() + seconds + _GRACE
    has_gpu = report.header["card"] != "no GPU"
    # Without the second name there would be no CPU for references.
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu" if has_gpu else "cpu", "PYTHONUNBUFFERED": "1"}
    # Parts, and another run of the script, find what was compiled and tuned before.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"\n=== {name}\n")
        errors.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=_ROOT
        )
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Any) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        last = None
        try:
            while (line := lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                if line.startswith("ROW "):
                    last = json.loads(line.removeprefix("ROW "))
                    if "device" in last:
                        report.header["device"] = "{kind} ({platform})".format(**last["device"])
                    else:
                        report.add({"part": name, **last})
            if process.wait(_GRACE):
                report.add({"part": name, "failed": f"ended with {process.returncode}: {_last_line(log)}"})
        except (queue.Empty, subprocess.TimeoutExpired):
            after = f" after {last['what']}, {last.get('path')}" if last and "what" in last else ""
            report.add({"part": name, "failed": f"was ended after {seconds:.0f} s{after}"})
        finally:
            process.kill()
            process.wait()


def _last_line(log: pathlib.Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160].replace("|", "/") if lines else ""


def main() -> int:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, default=_ROOT / "build/gpu_check", metavar="FOLDER")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help=f"all parts together ({_SECONDS} if not said)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="what has this in its name; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a CPU will do: to try the script")
    chosen = parser.parse_args()
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no part is left behind
    found = header(chosen.quick)
    if found["card"] == "no GPU" and not chosen.quick:
        print(
            "gpu_check: error: nvidia-smi finds no GPU here; run it on a machine with one, "
            "or give --quick to try the script on a CPU",
            file=sys.stderr,
        )
        return 2
    chosen.output.mkdir(parents=True, exist_ok=True)
    log = chosen.output / "log.txt"
    log.write_text("")
    report = Report(chosen.output, found)
    parts = _QUICK_PARTS if chosen.quick else _PARTS
    share = chosen.seconds / sum(seconds for *_, seconds in parts)
    ends = 0.0
    references = pathlib.Path(tempfile.mkdtemp(prefix="gpu_check"))
    try:
        for name, (script, *words), seconds in parts:
            ends += share * seconds
            left = ends - (time.monotonic() - begin) - _GRACE
            if "torch" in script and "torch " not in found["versions"]:
                report.add({"part": name, "skipped": "there is no PyTorch here"})
                continue
            if left < 1:
                report.add({"part": name, "skipped": "no time was left"})
                continue
            command = [sys.executable, str(_ROOT / "scripts" / script), *words]
            command += ["--seconds", str(left), "--references", str(references)]
            command += [*(f"--only={text}" for text in chosen.only), *(["--quick"] if chosen.quick else [])]
            run_part(report, name, command, left, log)
    finally:
        shutil.rmtree(references, ignore_errors=True)
        report.header["seconds"] = round(time.monotonic() - begin)
        report.write()
    print(report.table())
    return 0 if all(row.get("agrees", "failed" not in row) for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())

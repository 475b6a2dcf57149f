"""The commands of README.md and docs/ on a fresh copy of the repository, set up with uv on PATH and without.

What needs pods, a cloud or an hour is called with --help alone: the program is found, and takes it.
tests/test_docs.py has its options read.
"""

import glob
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from pages import PAGES, ROOT, commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = [
    *("--model.num-layers", "1", "--model.model-dim", "8", "--model.num-heads", "2", "--model.mlp-dim", "8"),
    *("--data.context-length", "128", "--training.steps", "2", "--training.batch-size", "2"),
    *("--training.warmup-steps", "1", "--evaluation.batch-size", "64", "--evaluation.tokens", "512"),
    *("--evaluation.stride", "128", "--evaluation.sample-tokens", "4"),
]
# Each compiles a program of its own, which tests/evaluation has: one of them is run.
OPTIONS_OF_EVAL = (
    "--step",
    "--mode",
    "--model.aggregation none",
    "--model.segment-length",
    "--model.segmentation",
)
# What is appended to a command, by how it begins; the longest that fits counts. None: not run at all.
APPENDED: dict[str, list[str] | None] = {
    "scripts/train": TINY,
    "scripts/test": ["tests/test_absent_tpu.py"],
    "scripts/setup": None,  # some bring gigabytes
    "scripts/setup aot": [],  # scripts/test does so too
    "scripts/setup eval": [],
    "scripts/launch": None,
    "scripts/gpu_check": ["--help"],
    "mc-jax train": ["--help"],
    "mc-jax train quickstart --name mine": TINY,
    "mc-jax train quickstart --name mine --init": ["--help"],
    "mc-jax eval": ["--help"],
    "mc-jax export": ["--help"],
    "mc-jax eval runs/quickstart": [],
    "mc-jax eval runs/quickstart runs/residual": ["--help"],
    **{f"mc-jax eval runs/quickstart {option}": ["--help"] for option in OPTIONS_OF_EVAL},
    "mc-jax sweep": ["--help"],
    "mc-jax sweep runs/quickstart --aggregation gated sparse none --top-k 1 2": ["--dry-run"],
    "mc-jax sweep runs/quickstart --aggregation gated sparse none --top-k 1 2 --segmentation": [],
    "mc-jax eval runs/quickstart --tasks passkey s-niah-1": [
        *("--recall.length", "512", "--recall.samples", "1"),
        "--recall.no-generate",
    ],
    "mc-jax eval runs/quickstart --tasks passkey s-niah-1 --recall.length": ["--help"],
    "mc-jax eval runs/quickstart --tasks passkey --model": ["--help"],
    "mc-jax eval runs/quickstart --tasks all": ["--help"],
    "mc-jax eval runs/quickstart --tasks": ["--help"],
    "mc-jax eval runs/quickstart --inspect-router README.md": [],
    "mc-jax eval runs/quickstart --inspect-router letter.txt": ["--help"],
    "mc-jax generate": ["--tokens", "4"],
    "mc-jax generate gs:": ["--help"],
    "mc-jax generate runs/docstrings": ["--help"],
    "mc-jax prepare": ["--vocab-size", "270"],
    "mc-jax prepare my-text/*.txt --output my-corpus --tokenizer": ["--help"],
    "mc-jax prepare docstrings.jsonl": [],
    "mc-jax compare": ["--help"],
    "mc-jax compare runs/quickstart runs/mine": [],
    "mc-jax plan": ["--help"],
    "mc-jax checkpoints": ["--help"],
    "mc-jax selftest": ["--help"],
    "python -m": ["--help"],
    "python -m experiments.docstrings": [],
}
FOREIGN = ("docker", "gcloud", "sbatch", "sky", "tensorboard", "xpk")
pytestmark = pytest.mark.xdist_group("fresh clone")  # one worker: they share it
TEXT = "the sea was calm and the wind came from the west; she walked along the shore. " * 200


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git follows, as it is now."""
    folder = tmp_path_factory.mktemp("fresh") / "mc_jax"
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "my-text").mkdir()
    for number in range(3):
        (folder / "my-text" / f"{number}.txt").write_text(TEXT)
        (folder / "my-text" / f"{number}.jsonl").write_text(f'{{"text": "{TEXT}"}}\n')
    (folder / "held-out.jsonl").write_text(f'{{"text": "{TEXT}"}}\n')
    return folder


@pytest.fixture(scope="module")
def without_uv(tmp_path_factory):
    """Variables in which uv is not found, nor this environment's programs, and compiled programs are kept."""
    folder = tmp_path_factory.mktemp("no uv")
    (folder / "uv").write_text("#!/bin/sh\necho uv: command not found >&2\nexit 127\n")
    (folder / "uv").chmod(0o755)
    own = pathlib.Path(sys.executable).parent
    others = [entry for entry in os.environ["PATH"].split(os.pathsep) if pathlib.Path(entry) != own]
    unset = ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {
        "PATH": os.pathsep.join([str(folder), *others]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(words: list[str], where: str, folder: pathlib.Path, variables: dict[str, str]) -> None:
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}: {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def appended_to(words: list[str]) -> list[str] | None:
    """What a command gets to be quick; None: it is not run."""
    if words[0] in FOREIGN:
        return None
    line = " ".join(words) + " "
    fitting = [begin for begin in APPENDED if line.startswith(begin + " ") or line.startswith(begin + "/")]
    assert fitting, f"tell APPENDED how {line!r} is run quickly"
    return APPENDED[max(fitting, key=len)]


def test_every_command_of_the_pages_runs_without_uv(clone, without_uv):
    run(["scripts/setup"], "the first command", clone, without_uv)
    done = set()  # a page that says what another one said before, in the same environment, is believed
    for page in PAGES:
        variables = without_uv
        for command in commands(page):
            if command.words[0] == "source":
                scripts = clone / pathlib.Path(command.words[1]).parent
                assert (clone / command.words[1]).is_file(), command
                variables = without_uv | {"PATH": f"{scripts}{os.pathsep}{without_uv['PATH']}"}
                continue
            appended = appended_to(command.words)
            if appended is None:
                continue
            words = [
                found
                for word in command.words
                for found in (sorted(glob.glob(word, root_dir=clone)) if "*" in word else [word])
            ]
            key = (*words, *appended, variables["PATH"])
            if key in done:
                continue
            done.add(key)
            if words[:2] == ["mc-jax", "prepare"]:
                shutil.rmtree(clone / words[words.index("--output") + 1], ignore_errors=True)
            run([*words, *appended], command.where, clone, variables)


def test_uv_on_path_is_taken(clone, without_uv, tmp_path):
    shutil.move(clone / ".tools" / "uv", tmp_path / "uv")
    (clone / ".venv" / ".setup").unlink()
    variables = without_uv | {"PATH": f"{tmp_path / 'uv' / 'bin'}{os.pathsep}{without_uv['PATH']}"}
    run(["scripts/setup"], "with uv on PATH", clone, variables)
    assert not (clone / ".tools" / "uv").exists(), "it was installed again"
    run([".venv/bin/mc-jax", "--help"], "what was set up", clone, variables)

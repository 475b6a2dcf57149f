"""What scripts/launch starts is a command that mc-jax takes, and a run that is taken away starts again.

scripts/launch/validate asks XPK and SkyPilot themselves; it installs both, and so is no part of these.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import yaml
from typed import parse_mc_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch"
PLACEHOLDERS = {"NAME": "a-run", "RECIPE": "quickstart", "RUNS_DIR": "gs://bucket/runs"}

SAVES_AT_SIGTERM = """
import signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
print("ready", flush=True)
while not stop: time.sleep(0.01)
print("saved", flush=True)
sys.exit(int(sys.argv[1]))
"""


def shell_scripts() -> list[pathlib.Path]:
    files = [*(ROOT / "scripts").iterdir(), *LAUNCH.iterdir(), ROOT / ".ci" / "run"]
    return sorted(
        file for file in files if file.is_file() and file.read_bytes().startswith(b"#!/usr/bin/env bash")
    )


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_shell_script_is_one(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch", f"chmod +x {script}"


# --- resumable ---


@pytest.mark.parametrize("code", [0, 2, 77])
def test_an_end_of_its_own_keeps_its_code(code):
    assert (
        subprocess.run([LAUNCH / "resumable", "bash", "-c", f"exit {code}"], check=False).returncode == code
    )


@pytest.mark.parametrize(("code", "told"), [(0, 143), (2, 2)])
@pytest.mark.parametrize("around", ["", "XPK's shell"])
def test_sigterm_reaches_the_training_and_shows_in_the_code(code, told, around):
    words = [str(LAUNCH / "resumable"), sys.executable, "-c", SAVES_AT_SIGTERM, str(code)]
    if around:  # the first process of XPK's container hands SIGTERM to its child alone
        command = f"exec {shlex.join(words)}"
        words = ["bash", "-c", f"trap 'kill -TERM $!' TERM; ({command}) & p=$!; wait $p; wait $p; exit $?"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n", "the training was not let finish its checkpoint"
    assert process.returncode == told


# --- what is started ---


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like the repository's root, whose programs only tell what they were given."""
    stubs = tmp_path / "stubs"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stubs.mkdir()
    shutil.copytree(LAUNCH, tmp_path / "scripts" / "launch")
    tell = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$TOLD.${0##*/}"\n'
    bodies = {
        tmp_path / ".venv" / "bin" / "mc-jax": tell + "exit ${CODE:-0}\n",
        stubs / "xpk": tell,
        stubs / "scontrol": tell,
        stubs / "srun": '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    }
    for file, body in bodies.items():
        file.write_text(body)
        file.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("PATH", f"{stubs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def told(checkout: pathlib.Path, program: str) -> list[str] | None:
    """The arguments that a stub was called with; None: it was not called."""
    file = checkout / f"told.{program}"
    return file.read_text().split("\0")[:-1] if file.exists() else None


def started_by_gke(checkout: pathlib.Path, *words: str) -> tuple[dict[str, str], list[str]]:
    """XPK's options, and the words of mc-jax."""
    subprocess.run([LAUNCH / "gke", *words], check=True)
    given = told(checkout, "xpk")
    assert given is not None
    assert given[:2] == ["workload", "create"]
    options = {
        name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in given[2:])
    }
    start = ["exec", "scripts/launch/resumable", "mc-jax"]
    command = shlex.split(options["command"])
    assert command[:3] == start, command
    return options, command[3:]


GKE = ["--cluster", "c", "--image", "an-image", "--name", "a-run"]


@pytest.mark.parametrize(
    ("topology", "tpu_type"),
    [
        ("v5p:4x4x4", "v5p-4x4x4"),
        ("v5e:4x4", "v5litepod-4x4"),
        ("v6e:16x16", "v6e-16x16"),
        ("tpu7x:2x2x2", "tpu7x-2x2x2"),
    ],
)
def test_gke_starts_the_recipe_on_the_slices_that_were_planned(checkout, topology, tpu_type):
    train = [
        "quickstart",
        "--runs-dir",
        "gs://bucket/runs",
        "--evaluation.sample-prompt",
        'It\'s "so" & $HOME',
    ]
    options, words = started_by_gke(
        checkout, *GKE, "--topology", topology, "--slices=2", "--spot", "--", *train
    )
    assert (options["tpu-type"], options["num-slices"]) == (tpu_type, "2")
    assert "spot" in options
    parsed = parse_mc_jax(words)
    assert (parsed.name, parsed.runs_dir) == ("a-run", "gs://bucket/runs")
    assert parsed.config.evaluation.sample_prompt == 'It\'s "so" & $HOME'


def test_gke_starts_a_lost_run_again_but_no_mistake(checkout):
    options, _ = started_by_gke(
        checkout, *GKE, "--topology=v5p:4x4x4", "--", "quickstart", "--runs-dir=gs://bucket/runs"
    )
    assert int(options["max-restarts"]) > 0
    assert options["restart-on-exit-codes"] == "1", "XPK adds 127 to 255; 2 is a mistake of the user"
    assert int(options["termination-grace-period-seconds"]) >= 60, "a checkpoint takes its time"
    assert options["num-slices"] == "1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--topology v5p:4x4x4 -- quickstart --runs-dir gs://b", "--cluster is missing"),
        ("--cluster", "--cluster has no value"),
        ("--cluster c --topology v5p:4x4x4 --image i --name n", "which recipe?"),
        ("--cluster c --topology v5p:4x4x4 --image i --name n -- quickstart", "--runs-dir is missing"),
        ("--cluster c --topology h100:8 --image i --name n -- quickstart --runs-dir gs://b", "names no TPU"),
        ("--cluster c --topology v5p --image i --name n -- quickstart --runs-dir gs://b", "has no size"),
        ("--cluster c quickstart", "the recipe comes after --"),
    ],
)
def test_a_mistake_with_gke_is_one_line(checkout, words, message):
    done = subprocess.run([LAUNCH / "gke", *words.split()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert told(checkout, "xpk") is None


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("sky_*.yaml")), ids=lambda file: file.stem)
def test_a_sky_task_names_its_placeholders_and_starts_a_recipe(checkout, file):
    task = yaml.safe_load(file.read_text())
    assert {name for name, value in task["envs"].items() if value is None} == set(PLACEHOLDERS)
    given = PLACEHOLDERS | {"OPTIONS": "--training.steps 500 --model.num-layers 3"}
    assert set(task["envs"]) == set(given), "what SkyPilot does not set for this task, a placeholder must"
    sets = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    subprocess.run(["bash", "-uc", task["run"]], env={**os.environ, **given, **sets}, check=True)
    words = told(checkout, "mc-jax")
    assert words is not None
    parsed = parse_mc_jax(words)
    assert (parsed.name, parsed.runs_dir) == ("a-run", "gs://bucket/runs")
    assert (parsed.config.training.steps, parsed.config.model.num_layers) == (500, 3)
    if task.get("num_nodes", 1) > 1:
        of = parsed.processes
        assert (of.coordinator, of.count, of.index) == ("10.0.0.1:8476", 2, 1)
    recovery = task["resources"]["job_recovery"]
    assert 143 in recovery["recover_on_exit_codes"], "a preempted run would not be started again"


@pytest.mark.parametrize(
    ("code", "queues_again", "ends"), [(0, False, 0), (2, False, 2), (143, True, 0), (1, True, 0)]
)
def test_slurm_queues_a_lost_run_again_but_no_mistake(checkout, code, queues_again, ends):
    words = ["quickstart", "--runs-dir", "/shared/runs", "--training.steps", "500"]
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "12", "CODE": str(code)}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *words], env=environment, check=False)
    assert done.returncode == ends
    assert told(checkout, "mc-jax") == ["train", *words]
    assert parse_mc_jax(["train", *words]).config.training.steps == 500
    assert told(checkout, "scontrol") == (["requeue", "12"] if queues_again else None)


# --- the image ---


def test_the_image_is_made_of_files_and_extras_that_are_there():
    text = (LAUNCH / "Dockerfile").read_text()
    shown = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), f"there is no {source} to copy"
            assert source in shown, f"Dockerfile.dockerignore hides {source}"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(settings["optional-dependencies"])
    assert set(re.findall(r"--extra (\w+)", text)) | set(re.findall(r"DEVICE=(\w+)", text)) <= extras
    assert settings["readme"] in text
    assert f"FROM python:{(ROOT / '.python-version').read_text().strip()}" in text
    for file in sorted(LAUNCH.glob("sky_*.yaml")):
        assert set(re.findall(r"--extra (\w+)", file.read_text())) <= extras

"""A run's folder: one training at a time, begun whole, gone on with, never lost by mistake."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from mc_jax.data.prepare import prepare
from mc_jax.training import lock as locks
from mc_jax.training.lock import LOCK_FILE, RunLock
from mc_jax.training.run_folder import opened
from mc_jax.training.stages import STAGES_FILE, read_stages

WORDS = "the sea was calm and the wind came from the west; she walked along the shore. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(WORDS * 20)
    prepare([folder / "text.txt"], folder / "corpus", tokenizer="bytes")
    return folder / "corpus"


@pytest.fixture
def config(corpus):
    return Config(
        model=ModelConfig(
            num_layers=1, model_dim=16, num_heads=2, mlp_dim=32, segment_length=16, chunk_length=8
        ),
        data=DataConfig(corpus=str(corpus), tokenizer=None, context_length=64),
        training=TrainingConfig(steps=40, batch_size=4, warmup_steps=4),
        evaluation=EvaluationConfig(sample_tokens=8),
    )


@pytest.fixture
def run(tmp_path):
    return epath.Path(tmp_path / "runs" / "x")


def with_training(config: Config, **values) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **values))


def open_once(run, config, *, overwrite=False, step=0) -> int:
    """Open a run's folder as its training does, and return the rows that were read before."""
    with opened(run, config, overwrite=overwrite) as folder:
        return folder.begin(step)


def train_to(run, step: int) -> None:
    """Leave what a training leaves behind after some steps."""
    (run / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, step + 1)))


def names(run) -> set[str]:
    return {entry.name for entry in run.iterdir()}


WHOLE = {"config.json", "tokenizer.json", STAGES_FILE}


def test_a_folder_holds_a_run_and_no_lock_after_it_was_opened(run, config):
    with opened(run, config, overwrite=False):
        assert names(run) == WHOLE | {LOCK_FILE}
    assert names(run) == WHOLE
    assert configs.from_json((run / "config.json").read_text()) == config


# One training at a time


HOLDER = """
import fcntl, json, os, socket, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": "now", "nonce": "a"}, file)
    file.flush()
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(run):
    """Another process that holds the lock."""
    run.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-S", "-c", HOLDER, os.fspath(run / LOCK_FILE)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_training_of_a_name_is_refused_and_loses_nothing(run, config, overwrite):
    open_once(run, config)
    train_to(run, 10)
    with held_elsewhere(run) as holder:
        before = {name: (run / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
        with pytest.raises(ValueError, match=rf"^process {holder.pid} on .* trains .*x; wait until it ends"):
            open_once(run, config, overwrite=overwrite)
        assert {name: (run / name).read_bytes() for name in before} == before
        assert (run / LOCK_FILE).exists()
    open_once(run, config)


def test_a_killed_holder_s_lock_is_free_at_once(run, config):
    with held_elsewhere(run) as holder:
        holder.kill()
        holder.wait()
        assert (run / LOCK_FILE).exists()
        open_once(run, config)
    assert names(run) == WHOLE


def no_flock(*_):
    raise OSError(errno.ENOTSUP, "no locks here")


def written_by_another_host(run):
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK_FILE).write_text(json.dumps({"host": "node7", "pid": 3, "since": "then", "nonce": "a"}))


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_holder_on_another_host_that_no_longer_beats_is_dead(run, monkeypatch, capsys, has_flock):
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    written_by_another_host(run)
    with RunLock(run, between_beats=0.02, to_die=0.1):
        assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "process 3 on node7 (since then) had" in capsys.readouterr().out


def test_a_holder_that_beats_is_alive_where_there_is_no_flock(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    second = RunLock(run, between_beats=0.02, to_die=1.0)
    refused = pytest.raises(ValueError, match=rf"^process {os.getpid()} on .* trains")
    with RunLock(run, between_beats=0.02, to_die=1.0), refused, second:
        pass
    assert not run.exists(), "an empty folder that the lock made goes with it"


def test_a_holder_that_slept_notices_who_took_over(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with RunLock(run, between_beats=0.02, to_die=1.0) as lock:
        lock.check()
        written_by_another_host(run)
        lock._beats.join(timeout=5)
        with pytest.raises(ValueError, match=r"^process 3 on node7"):
            lock.check()
    assert (run / LOCK_FILE).exists(), "the other's lock stays"


def test_a_run_in_a_folder_that_was_deleted_or_moved_ends_in_one_line(run, config):
    with opened(run, config, overwrite=False) as folder:
        folder.check()
        run.rename(run.parent / "y")
        with pytest.raises(ValueError, match="x was deleted or moved while it trained"):
            folder.check()


# Begun whole


@pytest.mark.parametrize(
    "left",
    [
        {"tokenizer.json.partial": ""},
        {"tokenizer.json": "", "config.json.part": "{"},
        {"tokenizer.json": "", "config.json": ""},
        {LOCK_FILE: "", STAGES_FILE: ""},
        {"tokenizer.json": "", ".nfs0001": ""},
        {"overwritten.part": "{}", "metrics.jsonl": "x", "tokenizer.json": "x"},
    ],
    ids=lambda left: " ".join(left),
)
def test_a_half_made_folder_is_finished(run, config, left):
    (run / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    for name, text in left.items():
        (run / name).write_text(text)
    open_once(run, config)
    assert names(run) >= WHOLE
    assert not [name for name in names(run) if name.endswith((".part", ".partial"))]
    assert configs.from_json((run / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("left", "told"),
    [("thesis.txt", "is not empty and not a run"), ("checkpoints/5/state", "has checkpoints and no config")],
)
def test_what_is_not_ours_stays_as_it_is(run, config, left, told):
    (run / left).mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=told):
            open_once(run, config, overwrite=overwrite)
    assert names(run) == {left.partition("/")[0]}


def test_a_disk_that_is_full_while_the_folder_is_made_leaves_one_that_is_finished_later(
    run, config, monkeypatch
):
    fsync, left = os.fsync, 0

    def sync(opened):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        fsync(opened)

    monkeypatch.setattr(os, "fsync", sync)
    for room in range(8):
        left, folder = room, run / str(room)
        with pytest.raises(OSError, match="No space"):
            open_once(folder, config)
        left = 100
        open_once(folder, config)
        assert names(folder) == WHOLE


def test_every_file_is_on_the_disk_before_its_name_and_config_json_comes_last(run, config, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def sync(opened):
        order.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{opened}"))))
        fsync(opened)

    def rename(source, target):
        order.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "rename", rename)
    open_once(run, config)
    assert ("sync", "runs") in order, "the run's own name must be on the disk"
    at = {}
    for name in ("tokenizer.json", STAGES_FILE, "config.json"):
        at[name] = order.index(("rename", name))
        assert order[at[name] - 1] == ("sync", f"{name}.part")
        assert order[at[name] + 1] == ("sync", "x")
    assert max(at.values()) == at["config.json"]


# Overwritten


def test_the_same_command_with_overwrite_goes_on_with_what_it_began(run, config, capsys):
    open_once(run, config)
    train_to(run, 10)
    open_once(run, config, overwrite=True)
    assert not (run / "checkpoints").exists(), "the first one starts anew"
    train_to(run, 20)
    capsys.readouterr()
    open_once(run, config, overwrite=True, step=20)
    assert (run / "checkpoints" / "20").exists()
    assert "it goes on; delete the folder to start anew" in capsys.readouterr().out
    open_once(run, with_training(config, seed=1), overwrite=True)
    assert not (run / "checkpoints").exists(), "another command starts anew"
    train_to(run, 40)
    open_once(run, with_training(config, seed=1), overwrite=True, step=40)
    assert (run / "checkpoints" / "40").exists(), "killed before its report, it has not ended"
    (run / "report.html").write_text("")
    open_once(run, with_training(config, seed=1), overwrite=True)
    assert not (run / "checkpoints").exists(), "what has ended starts anew"


def test_an_overwrite_that_is_killed_half_way_is_finished_by_any_start(run, config, monkeypatch):
    open_once(run, config)
    train_to(run, 10)
    with monkeypatch.context() as patched:
        patched.setattr(type(run), "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_once(run, config, overwrite=True)
    open_once(run, config)
    assert names(run) == WHOLE


def test_settings_that_are_refused_overwrite_nothing(run, config):
    open_once(run, config)
    train_to(run, 10)
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus="nowhere"))
    with pytest.raises(ValueError, match="no embedded corpus and no folder"):
        open_once(run, nowhere, overwrite=True)
    assert (run / "checkpoints" / "10").exists()


# Gone on with


def test_a_run_is_made_longer_and_says_so(run, config, capsys):
    open_once(run, config)
    train_to(run, 40)
    longer = with_training(config, steps=60, learning_rate=1e-4, schedule="wsd", decay_steps=10, batch_size=8)
    assert open_once(run, longer, step=40) == 40 * 4
    said = capsys.readouterr().out
    assert "goes on with other settings from step 40: " in said
    assert "training.steps 40 -> 60, " in said
    assert configs.from_json((run / "config.json").read_text()) == longer
    (run / "checkpoints" / "50").mkdir()
    assert open_once(run, longer, step=50) == 40 * 4 + 10 * 8
    assert capsys.readouterr().out == "", "told once"
    stages = read_stages(run)
    assert [stage.from_step for stage in stages.stages] == [0, 40]
    assert stages.changes()[0].settings["training.batch_size"] == (4, 8)


def test_a_stage_that_was_never_saved_is_forgotten(run, config):
    open_once(run, config)
    train_to(run, 10)
    open_once(run, with_training(config, batch_size=8), step=10)
    open_once(run, with_training(config, batch_size=2), step=10)
    assert [(stage.from_step, stage.batch_size) for stage in read_stages(run).stages] == [(0, 4), (10, 2)]
    open_once(run, config, step=10)
    assert [(stage.from_step, stage.batch_size) for stage in read_stages(run).stages] == [(0, 4)]


def test_an_older_run_without_stages_goes_on(run, config):
    open_once(run, config)
    train_to(run, 10)
    (run / STAGES_FILE).unlink()
    assert open_once(run, config, step=10) == 40
    assert open_once(run, with_training(config, batch_size=8), step=10) == 40
    assert [stage.from_step for stage in read_stages(run).stages] == [0, 10]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"num_layers": 2}),
        ("model", {"memory": "delta"}),
        ("data", {"context_length": 128}),
        ("training", {"seed": 1}),
        ("training", {"optimizer": "muon"}),
    ],
)
def test_what_would_change_the_past_is_refused_with_the_differences(run, config, section, values):
    open_once(run, config)
    train_to(run, 10)
    before = (run / "config.json").read_text()
    changed = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )
    with pytest.raises(
        ValueError, match=f"{section}.{next(iter(values))} .* there, .* here.*--name, or --over"
    ):
        open_once(run, changed)
    assert (run / "config.json").read_text() == before


def test_a_run_cannot_be_made_shorter_than_it_is(run, config):
    open_once(run, config)
    train_to(run, 30)
    with pytest.raises(
        ValueError, match=r"training\.steps is 20 and .* has trained 30 already; set it to 30"
    ):
        open_once(run, with_training(config, steps=20))


def test_damaged_stages_are_named(run, config):
    open_once(run, config)
    train_to(run, 10)
    for text in ("", "[]", '{"stages": [{}], "overwrites": false}', '{"stages": 3}'):
        (run / STAGES_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"stages\.json is damaged"):
            open_once(run, config)


def test_beats_confirm_the_holder_without_a_second_file(run):
    with RunLock(run, between_beats=0.01, to_die=1.0) as lock:
        first = (run / LOCK_FILE).read_text()
        assert not locks._now() < json.loads(first)["refreshed"]
        lock.check()
        assert names(run) == {LOCK_FILE}

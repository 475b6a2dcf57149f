"""A run's folder: begun whole, gone on with, never lost by mistake."""

import dataclasses
import errno
import json
import os

import jax
import pytest
from run_folders import names, open_once, train_to, with_training

from mc_jax import config as configs
from mc_jax.config import EvaluationConfig
from mc_jax.training.lock import LOCK_FILE
from mc_jax.training.run_folder import opened
from mc_jax.training.stages import STAGES_FILE, read_stages

WHOLE = {"config.json", "tokenizer.json", STAGES_FILE}


def test_a_folder_holds_a_run_and_no_lock_after_it_was_opened(run, config):
    with opened(run, config, overwrite=False):
        assert names(run) == WHOLE | {LOCK_FILE}
    assert names(run) == WHOLE
    assert configs.from_json((run / "config.json").read_text()) == config


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


def test_a_path_that_checkpoints_are_not_found_in_is_refused_before_anything_is_written(run, config):
    with pytest.raises(ValueError, match=r"with '\['"):
        open_once(run / "a[1]", config)
    assert not run.exists() or not names(run)


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


def test_a_run_from_before_branches_goes_on_as_plain_by_the_command_that_began_it(run, config):
    deep = dataclasses.replace(config.model, memory="titans", memory_depth=2)
    config = dataclasses.replace(config, model=deep)
    open_once(run, config)
    written = json.loads((run / "config.json").read_text())
    del written["model"]["memory_branch"]
    (run / "config.json").write_text(json.dumps(written))
    with opened(run, config, overwrite=False) as folder:
        assert folder.config.model.memory_branch == "plain"
    bounded = dataclasses.replace(config, model=dataclasses.replace(deep, memory_branch="bounded"))
    with pytest.raises(ValueError, match=r"model\.memory_branch 'plain' there, 'bounded' here"):
        open_once(run, bounded)


def test_settings_that_are_refused_overwrite_nothing(run, config):
    open_once(run, config)
    train_to(run, 10)
    nowhere = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus="nowhere"))
    with pytest.raises(ValueError, match="no embedded corpus and no folder"):
        open_once(run, nowhere, overwrite=True)
    assert (run / "checkpoints" / "10").exists()


def test_results_on_text_that_is_not_there_are_refused_before_anything_is_written(run, config):
    asking = dataclasses.replace(config, evaluation=EvaluationConfig(every=10))
    with pytest.raises(ValueError, match=r"evaluation\.every 10 needs held-out text, and .* has none"):
        open_once(run, asking)
    assert not run.exists()


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


def test_an_older_run_without_stages_goes_on(run, config, monkeypatch):
    open_once(run, config)
    train_to(run, 10)
    (run / STAGES_FILE).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_index", lambda: 1)
        assert open_once(run, config, step=10) == 40, "a second process reads the rows after the same one"
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

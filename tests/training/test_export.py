"""Weights alone, exported: read as their run is, begun with, and nothing else."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from untrained import kept_run

from mc_jax.cli import main
from mc_jax.inference.generate import generate_run
from mc_jax.parallel import make_mesh
from mc_jax.training import loop
from mc_jax.training.initial import Init
from mc_jax.training.run import load_run, read_config
from mc_jax.training.step import by_name, split_model


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return kept_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "weights"
    assert main(["export", str(run), str(folder)]) == 0
    return folder


def weights(folder):
    return by_name(split_model(load_run(folder).model)[1])


def size(folder):
    return sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())


def test_an_export_is_read_as_its_run_is_from_fewer_bytes(run, exported, capsys):
    found, expected = weights(exported), weights(run)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], name)
    options = {"tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert generate_run(exported, "she", **options) == generate_run(run, "she", **options)
    origin = json.loads((exported / "export.json").read_text())
    assert (origin["run"], origin["step"]) == (str(run), 2)
    assert origin["parameters"] == sum(leaf.size for leaf in expected.values())
    one_step = size(run / "checkpoints" / "2")
    assert size(exported / "checkpoints") < 0.6 * one_step, "of AdamW's state two thirds are moments"


def test_an_earlier_step_can_be_exported(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "first"), "--step", "1"]) == 0
    assert load_run(tmp_path / "first").step == 1


def test_a_training_begins_with_exported_weights(run, exported, tmp_path, capsys):
    config = read_config(run)
    training = dataclasses.replace(config.training, steps=1, learning_rate=1e-12)
    config = dataclasses.replace(config, training=training)
    loop.train(config, tmp_path / "new", init=Init(path=str(exported)))
    told = capsys.readouterr().out
    assert f"begins with --init {exported} (exported weights, step 2): weights alone" in told
    for name, values in weights(run).items():
        np.testing.assert_allclose(weights(tmp_path / "new")[name], values, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "{run}", "{exported}"], "is there already; name another folder"),
        (["export", "{run}", "{run}-9", "--step", "9"], "has no checkpoint of step 9; there are 1, 2"),
        (["export", "{run}-none", "{run}-9"], "there is no run in"),
        (["export", "{run}", "gs://bucket/weights"], "is no folder on a disk"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(words, told, run, exported, capsys):
    capsys.readouterr()
    assert main([word.format(run=run, exported=exported) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not epath.Path(f"{run}-9").exists()


def test_a_training_neither_goes_on_in_an_export_nor_takes_an_optimizer_from_it(
    exported, monkeypatch, capsys
):
    monkeypatch.chdir(exported.parent)
    words = ["train", "quickstart", "--runs-dir", "."]
    assert main([*words, "--name", "weights"]) == 2
    assert "holds exported weights, which do not go on" in capsys.readouterr().err
    store = ["--data.corpus", "store", "--data.tokenizer", "None", "--data.vocab-size", "None"]
    assert main([*words, "--name", "x", "--init", "weights", "--init-state", "full", *store]) == 2
    assert "does not fit: weights alone were exported; leave --init-state out" in capsys.readouterr().err
    assert not (exported.parent / "x" / "config.json").exists()


def test_a_damaged_export_is_refused(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "bad")]) == 0
    files = [file for file in (tmp_path / "bad" / "checkpoints").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    with pytest.raises(ValueError, match="has no whole checkpoint to begin from"):
        load_run(tmp_path / "bad")

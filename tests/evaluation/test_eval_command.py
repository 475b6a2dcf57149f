"""`mc-jax eval`: what it prints, writes and refuses."""

import json
import types

import jax
import pytest
from untrained import WORDS, kept_run

from mc_jax.cli import main
from mc_jax.evaluation.perplexity import evaluate_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints of one run, as a training leaves them, and a text file."""
    folder = tmp_path_factory.mktemp("eval")
    kept_run(folder)
    return folder


@pytest.fixture(autouse=True)
def few_devices(request, monkeypatch):
    """Of the eight that tests have two for one test, and one for the others: more take longer to compile."""
    count = 2 if "two_devices" in request.node.name else 1
    seen = types.SimpleNamespace(devices=lambda: jax.devices()[:count], set_mesh=jax.set_mesh)
    monkeypatch.setattr("mc_jax.evaluation.devices.jax", seen)


def said(capsys, *words) -> str:
    assert main(["eval", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert main(["eval", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_run_alone_is_measured_as_its_training_does_on_two_devices(folder, capsys):
    found, expected = json.loads(said(capsys, folder / "run", "--json")), evaluate_run(folder / "run")
    assert found["step"] == 2
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), "two devices find what one does"


def test_the_dial_is_turned_and_told_and_written(folder, capsys, tmp_path):
    words = ("--model.aggregation", "sparse", "--model.top-k", 1, "--model.segment-length", 4)
    text = said(capsys, folder / "run", *words, "--mode", "by-position", "--output", tmp_path / "found")
    assert "model.aggregation gated -> sparse" in text
    assert "±" in text
    assert "word perplexity" in text
    assert "mode by-position, context length 32, stride 32" in text
    assert "16 to 31" in text
    found = json.loads((tmp_path / "found" / "run.by-position.json").read_text())
    assert found["turned"]["model.segment_length"] == {"trained": 8, "measured": 4}
    assert len(found["hashes"]["checkpoint"]) == 64
    told = refused(capsys, folder / "run", "--mode", "by-position", "--output", tmp_path / "found")
    assert "is there already" in told


def test_an_earlier_step_is_compared_on_a_text_of_its_own(folder, capsys):
    words = ("--step", 1, "--text", folder / "text.txt", "--mode", "last-k", "--last-k", 8, "--json")
    first, second = json.loads(said(capsys, folder / "run", folder / "run", *words))
    assert first["step"] == second["step"] == 1
    assert first["tokens"] == len(WORDS) * 8 + 1 - 24
    assert second["less_the_first"]["loss"] == 0
    assert "less_the_first" not in first


def test_a_stream_is_read_with_few_places_and_says_so(folder, capsys):
    words = ("--mode", "stream", "--max-cached", 2, "--when-full", "drop-oldest", "--state-dtype", "int8")
    found = json.loads(said(capsys, folder / "run", *words, "--json"))
    assert (found["max_cached"], found["when_full"], found["state_dtype"]) == (2, "drop-oldest", "int8")
    assert found["tokens"] == len(WORDS) * 2 + 1
    assert found["cache_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--step 7", "no checkpoint of step 7; there are 1, 2"),
        ("--last-k 4", "--last-k has no effect with --mode windows; set --mode last-k"),
        ("--mode last-k --evaluation.stride 4", "--evaluation.stride has no effect with --mode last-k"),
        ("--model.top-k 2", "has no effect with model.aggregation 'gated'"),
        ("--text nowhere.txt", "there is no file nowhere.txt"),
        ("--text a.txt --data.corpus b", "--data.corpus has no effect with --text"),
        ("--text a.txt --text-field b", "--text-field has no effect"),
        ("--data.context-length 8 --evaluation.stride 9", "evaluation.stride 9 is more than"),
        ("--max-cached 2", "--max-cached has no effect with --mode windows; set --mode stream"),
        ("--mode stream --data.context-length 64", "--data.context-length has no effect with --mode stream"),
        (
            "--mode stream --model.aggregation none --max-cached 2",
            "a storage has no effect with aggregation 'none'",
        ),
        ("--data.corpus nowhere", "no prepared folder"),
    ],
)
def test_a_mistake_is_told_in_a_line(folder, capsys, words, told):
    assert told in refused(capsys, folder / "run", *words.split())


def test_two_runs_of_one_name_are_not_written_over_each_other(folder, capsys, tmp_path):
    told = refused(capsys, folder / "run", folder / "run", "--output", tmp_path / "found")
    assert "two runs are called run" in told
    assert not (tmp_path / "found").exists()

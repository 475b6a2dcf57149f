"""Tasks from the command line to files: what is asked of a run, what is told, what is refused."""

import dataclasses
import hashlib
import json
import math
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from html_pages import must_fit_in_a_browser, must_load_nothing
from workplaces import WORDS

from mc_jax.cli import main
from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, to_json
from mc_jax.data.dataset import Dataset
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import memory_store
from mc_jax.data.tokenizer import train_bpe
from mc_jax.evaluation.recall import RecallSettings
from mc_jax.evaluation.tasks import files
from mc_jax.evaluation.tasks.files import write_results
from mc_jax.evaluation.tasks.page import tasks_page
from mc_jax.evaluation.tasks.runner import recall
from mc_jax.nn import LanguageModel
from mc_jax.training import run as runs
from mc_jax.training.run import Run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A run as it is read back, whose model knows nothing; its checkpoint is a digest alone."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        model=ModelConfig(
            num_layers=1, model_dim=16, num_heads=2, mlp_dim=16, segment_length=16, chunk_length=8
        ),
        data=DataConfig(corpus="words", tokenizer=None, context_length=400),
        evaluation=EvaluationConfig(batch_size=2),
    )
    digest = folder / "checkpoints" / "7" / "digest.0.json"
    digest.parent.mkdir(parents=True)
    digest.write_text("{}")
    (folder / "config.json").write_text(to_json(config))
    tokenizer = train_bpe([WORDS * 40], 290)
    store = memory_store(tokenize([Document("words", WORDS)], tokenizer), tokenizer)
    dataset = Dataset(tokenizer=tokenizer, train=store, held_out=None)
    model = LanguageModel(config.model, tokenizer.vocab_size, rngs=nnx.Rngs(params=0))
    return Run(epath.Path(folder), config, dataset, model, 7)


@pytest.fixture
def run(loaded, monkeypatch):
    """The folder of that run."""
    monkeypatch.setattr(runs, "load_run", lambda *_: loaded)
    return loaded.folder


def test_the_command_writes_results_and_every_sample_whole(run, tmp_path, capsys):
    words = "--tasks mqar passkey --recall.length 395 400 --recall.samples 3 --recall.alternatives 2"
    output = tmp_path / "recall"
    assert main(["eval", str(run), *words.split(), "--recall.seed", "4", "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert "passkey: 3 samples of 400 tokens are done" in told.err
    assert str(output / "samples.jsonl") in told.out
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    kinds = [(line["task"], line["length"], line["index"]) for line in lines]
    lengths = (395, 400)
    assert kinds == [
        (task, length, i) for task in ("mqar", "passkey") for length in lengths for i in range(3)
    ]
    assert all(line["tokens"] <= line["length"] for line in lines)
    last = lines[-1]
    assert last["prompt_sha256"] == hashlib.sha256(last["prompt"].encode()).hexdigest()
    assert {"exact", "ranked first", "greedy", "log-likelihood", "router hit"} == last["scores"].keys()
    assert last["scores"]["router hit"] == np.mean(last["router_hits"])
    start, stop = last["needle"]
    assert last["answers"][0] in last["prompt"][start:stop]
    assert 1 <= last["rank"] <= 3
    assert isinstance(last["generated"], str)

    (results,) = json.loads((output / "results.json").read_text())["runs"]
    assert results["step"] == 7
    assert len(results["hashes"]["checkpoint"]) == len(results["hashes"]["tokenizer"]) == 64
    mqar, passkey = results["tasks"]
    assert mqar["sources"] == {"tokens": ["289 symbols of the run's vocabulary"]}
    whole = [cell for cell in passkey["cells"] if cell["depth"] is None]
    assert [cell["length"] for cell in whole] == list(lengths)
    values = [line["scores"]["log-likelihood"] for line in lines[-3:]]
    mean = whole[-1]["means"]["log-likelihood"]
    np.testing.assert_allclose(mean["value"], np.mean(values))
    np.testing.assert_allclose(mean["stderr"], np.std(values, ddof=1) / math.sqrt(3))
    by_depth = {cell["depth"]: cell["samples"] for cell in passkey["cells"] if cell["length"] == 400}
    assert by_depth == {None: 3, 0.0: 1, 0.1: 1, 0.2: 1}

    page = (output / "tasks.html").read_text()
    assert page.count("<section>") == 3, "what was asked, and the tasks"
    assert "router hit" in page
    assert page.count("<figure>") == 1, "a task with depths has a picture, one without has none"
    assert "mean ± standard error" in page
    must_load_nothing(page)


def test_in_a_browser_the_page_fits_a_phone(loaded, tmp_path):
    found = recall(loaded, ["passkey"], RecallSettings(samples=3, generate=False))
    must_fit_in_a_browser(tasks_page([found]), 390, tmp_path)


def test_the_same_is_asked_again_and_json_is_one_line(run, capsys):
    words = ["eval", str(run), "--tasks", "mqar", "--recall.samples", "2", "--json"]
    printed = []
    for _ in range(2):
        assert main(words) == 0
        printed.append(json.loads(capsys.readouterr().out)["runs"])
    assert printed[0] == printed[1]


def test_two_runs_are_compared_sample_by_sample_and_the_dial_is_turned(loaded, monkeypatch, tmp_path, capsys):
    other = loaded.folder.parent / "other"
    if not other.exists():
        shutil.copytree(loaded.folder, other)
    read = {str(one): dataclasses.replace(loaded, folder=epath.Path(one)) for one in (loaded.folder, other)}
    weights = nnx.state(loaded.model)
    louder = nnx.merge(nnx.graphdef(loaded.model), jax.tree.map(lambda x: x * 2, weights))
    read[str(other)] = dataclasses.replace(read[str(other)], model=louder)
    monkeypatch.setattr(runs, "load_run", lambda folder, step: read[folder])
    words = "--tasks mqar --recall.samples 2 --model.aggregation none --output"
    assert main(["eval", *read, *words.split(), str(tmp_path / "recall")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"{other} is read otherwise than it was trained: model.aggregation gated -> none" in told
    first, second = json.loads((tmp_path / "recall" / "results.json").read_text())["runs"]
    assert first["turned"]["model.aggregation"] == {"trained": "gated", "measured": "none"}
    lines = [json.loads(line) for line in (tmp_path / "recall" / "samples.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == [str(loaded.folder)] * 2 + [str(other)] * 2
    values = [line["scores"]["log-likelihood"] for line in lines]
    differences = np.subtract(values[2:], values[:2])
    assert differences.any(), "the second run's weights are others"
    (cell,) = second["tasks"][0]["less_the_first"]
    found = cell["means"]["log-likelihood"]
    np.testing.assert_allclose(found["value"], differences.mean())
    np.testing.assert_allclose(found["stderr"], np.std(differences, ddof=1) / math.sqrt(2))
    page = (tmp_path / "recall" / "tasks.html").read_text()
    assert page.count("model.aggregation gated → none") == 2
    assert "other less the first" in page


def test_who_types_the_former_command_is_told_the_new_one(capsys):
    assert main(["tasks", "runs/a", "--tasks", "mqar"]) == 2
    assert "did you mean mc-jax eval RUN --tasks TASK ...?" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_nothing_half_written(loaded, tmp_path, monkeypatch):
    found = recall(loaded, ["mqar"], RecallSettings(samples=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_results([found], tmp_path / "recall")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--tasks passky", "there is no task 'passky'; known are mqar, mad-recall, "),
        ("--tasks", "--tasks are none; name one or more, each once, or all"),
        ("--tasks mqar mqar", "--tasks are mqar mqar; name one or more, each once, or all"),
        ("--tasks mqar --recall.samples 0", "recall.samples is 0; set it to 1 or more"),
        ("--tasks mqar --recall.alternatives -1", "recall.alternatives is -1; set it to 0 or more"),
        (
            "--tasks mqar --recall.length 64 64",
            "recall.length is 64 64; give lengths of 1 token or more, each once",
        ),
        ("--tasks mqar --recall.documents x.jsonl", "recall.documents has no effect on the task mqar"),
        ("--tasks key-value --recall.documents x.jsonl", "there is no file x.jsonl"),
        ("--tasks s-niah-1 --recall.length 64", "a length of 64 tokens is too short"),
        ("--tasks mqar --output .", ". is there already; give --output another folder"),
        ("--tasks mqar --recall.no-generate", "recall.generate has no effect on mqar"),
        ("--tasks mqar mad-recall --recall.alternatives 3", "no effect on mqar, mad-recall: rows of tokens"),
        ("--recall.samples 3", "--recall.samples has no effect without --tasks"),
        ("--tasks mqar --mode stream", "--mode has no effect with --tasks; leave it out"),
        ("--tasks mqar --text a.txt", "--text has no effect with --tasks; leave it out"),
        ("--tasks mqar --evaluation.stride 4", "--evaluation.stride has no effect with --tasks"),
        ("--tasks mqar --data.context-length 64", "no effect with --tasks; set --recall.length"),
        ("--tasks mqar --model.top-k 2", "has no effect with model.aggregation 'gated'"),
    ],
)
def test_mistakes_end_with_one_line(run, capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run), *words.split()]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())

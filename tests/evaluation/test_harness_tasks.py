"""Tasks of lm-eval, from files alone: its own wikitext by hand, questions with choices, texts with stops."""

import functools
import importlib
import json
import math
import os
import pathlib

# Read when lm-eval's libraries are imported: nothing of these tests may be downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import numpy as np
import pytest
import tokenizers
from untrained import run_of

pytest.importorskip("lm_eval", reason="lm-eval is not installed: scripts/setup eval")

import lm_eval.tasks

from mc_jax.cli import main as mc_jax
from mc_jax.config import to_json
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe, write_transformers_tokenizer
from mc_jax.evaluation.harness import model as harness_model
from mc_jax.evaluation.harness.__main__ import main
from mc_jax.evaluation.harness.settings import HarnessSettings
from mc_jax.evaluation.harness.tasks import check_names, run_harness, table, write_harness

LENGTH = 16
SEPARATOR = 256
# As in the data set: detokenized by hand, and words as lm-eval splits the raw page, empty ends included.
PAGES = {
    " The sea @-@ wall was 3 @.@ 5 m high . \n": (" The sea-wall was 3.5 m high.\n", 13),
    "She said , well , and went .": ("She said, well, and went .", 8),
}
WIKITEXT = pathlib.Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"


def write_task(folder: pathlib.Path, name: str, lines: list[dict], body: str) -> str:
    """A task's YAML beside its JSONL; the path of the first."""
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    head = (
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.jsonl\n  cache_dir: {folder / 'cache'}\n"
    )
    (folder / f"{name}.yaml").write_text(head + body)
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def questions(folder):
    body = (
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: right\nmetric_list:\n  - metric: acc\n"
    )
    lines = [
        {"question": "the sea", "choices": ["calm", "loud"], "right": 1},
        {"question": "one two", "choices": ["three", "x"], "right": 0},
    ]
    return write_task(folder, "questions", lines, body)


@pytest.fixture(scope="module")
def run():
    return run_of(context_length=LENGTH)


def test_word_perplexity_of_wikitext_is_that_by_hand(folder, run):
    body = f"include: {WIKITEXT}\ndataset_name: null\ntraining_split: null\nvalidation_split: null\n"
    file = write_task(folder, "pages", [{"page": page} for page in PAGES], body)
    found = run_harness(run, [file], HarnessSettings())["results"]["pages"]
    nats = 0.0
    forward = jax.jit(run.model)
    for text, _ in PAGES.values():
        ids = [SEPARATOR, *text.encode()]
        for end in {*range(LENGTH, len(text), LENGTH), len(text)}:
            start, scored = max(0, end - LENGTH), (end - 1) // LENGTH * LENGTH
            row = np.zeros((1, LENGTH), np.int32)
            row[0, : end - start] = ids[start:end]
            log_p = np.asarray(jax.nn.log_softmax(forward(row)[0]), np.float64)
            nats -= sum(log_p[place - start, ids[place + 1]] for place in range(scored, end))
    words = sum(words for _, words in PAGES.values())
    raw = sum(len(page.encode()) for page in PAGES)
    np.testing.assert_allclose(found["word_perplexity,none"], math.exp(nats / words), rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_byte,none"], nats / raw / math.log(2), rtol=1e-5)


def test_questions_of_a_local_file_are_asked_and_written_with_hashes(folder, questions, run):
    results = run_harness(run, [questions], HarnessSettings(limit=2))
    assert "|questions|" in table(results).replace(" ", "")
    write_harness({"x": results}, folder / "found")
    written = json.loads((folder / "found" / "results.json").read_text())
    assert written["results"]["questions"]["acc,none"] in (0.0, 0.5, 1.0)
    assert written["config"]["hashes"]["tokenizer"] == run.dataset.tokenizer.fingerprint
    assert written["config"]["run"] == str(run.folder)
    samples = [
        json.loads(line) for line in (folder / "found" / "samples_questions.jsonl").read_text().splitlines()
    ]
    assert [sample["doc"]["question"] for sample in samples] == ["the sea", "one two"]
    with pytest.raises(ValueError, match="is there already"):
        write_harness({"x": results}, folder / "found")


def test_results_of_several_runs_lie_in_a_folder_each(folder):
    results = {"results": {"a": {"acc,none": 0.5}}, "samples": {"a/b": [{"doc": 1}]}}
    write_harness({"one": results, "two": results}, folder / "several")
    files = {str(file.relative_to(folder / "several")) for file in (folder / "several").rglob("*.json*")}
    assert files == {
        f"{run}/{name}" for run in ("one", "two") for name in ("results.json", "samples_a_b.jsonl")
    }


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"stride": 8}, "stride has no effect on"),
        ({"lengths": (64,)}, "lengths have no effect on"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(questions, run, settings, refusal):
    with pytest.raises(ValueError, match=refusal):
        run_harness(run, [questions], HarnessSettings(**settings))


def test_the_program_of_lm_eval_knows_the_model(folder, questions, run, monkeypatch, capsys):
    monkeypatch.setattr(harness_model, "load_run", lambda folder, step: run)
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    # Without its own tasks: these are thousands of files.
    ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", ours)
    words = ["--model", "mc_jax", "--tasks", questions, "--batch_size", "2"]
    given = ["run=runs/x,step=7", "segment_length=8,batch_size=2"]
    assert main([*words, "--model_args", ",".join(given)]) == 0
    assert "|questions|" in capsys.readouterr().out.replace(" ", "")
    assert main([*words, "--model_args", "run=runs/x,top_q=1"]) == 2
    assert "has no setting 'top_q'" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_told(folder, run):
    with pytest.raises(ValueError, match=r"there is no file .*nothing\.yaml"):
        check_names([str(folder / "nothing.yaml")])
    broken = write_task(folder, "broken", [], "output_type: loglikelihood_rolling\ndoc_to_target: text\n")
    with pytest.raises(ValueError, match=r"lm-eval cannot load the task .*broken"):
        run_harness(run, [broken], HarnessSettings())


def test_mc_jax_eval_asks_tasks_of_lm_eval(folder, questions, run, monkeypatch, capsys):
    (folder / "a-run").mkdir()
    (folder / "a-run" / "config.json").write_text(to_json(run.config))
    monkeypatch.setattr("mc_jax.training.run.load_run", lambda folder, step: run)
    words = ["eval", str(folder / "a-run"), "--tasks", f"lm_eval:{questions}"]
    off = ["--model.aggregation", "none"]
    assert mc_jax([*words, "--lm-eval.limit", "1", *off, "--output", str(folder / "asked")]) == 0
    told = capsys.readouterr().out
    assert "|questions|" in told.replace(" ", "")
    assert "is read otherwise than it was trained: model.aggregation gated -> none" in told
    assert len((folder / "asked" / "samples_questions.jsonl").read_text().splitlines()) == 1
    written = json.loads((folder / "asked" / "results.json").read_text())
    assert written["config"]["turned"]["model.aggregation"] == {"trained": "gated", "measured": "none"}


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--tasks", "lm_eval:wikitext", "passkey"], "ask those of lm-eval by themselves"),
        (["--tasks", "lm_eval:wikitext", "--recall.samples", "3"], "--recall.samples has no effect"),
        (["--tasks", "lm_eval:wikitext", "--evaluation.stride", "8"], "set --lm-eval.stride"),
        (["--tasks", "passkey", "--lm-eval.limit", "3"], "--lm-eval.limit has no effect"),
        (["--lm-eval.limit", "3"], "--lm-eval.limit has no effect"),
        (["--tasks", "lm_eval:nothing.yaml"], "there is no file nothing.yaml"),
    ],
)
def test_options_that_do_not_fit_tasks_of_lm_eval_are_refused(words, refusal, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert mc_jax(["eval", str(tmp_path), *words]) == 2
    assert refusal in capsys.readouterr().err


def test_lm_eval_measures_prompts_by_the_tokenizer_of_the_run(tmp_path):
    text = "the sea was calm; it's 3 o'clock"
    for tokenizer in (ByteTokenizer(), train_bpe([text * 4], 270)):
        write_transformers_tokenizer(tokenizer, tmp_path)
        read = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert read.encode(text).ids == tokenizer.encode(text).tolist()


def test_a_task_of_ruler_is_asked_without_a_network_and_draws_the_same_prompts_again():
    for package in ("transformers", "wonderwords"):
        pytest.importorskip(package, reason=f"RULER's tasks in lm-eval need the package {package}")
    try:
        importlib.import_module("nltk").data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("NLTK_DATA names no folder with punkt_tab; the package llama-index-core has one")
    settings = HarnessSettings(lengths=(1024,), limit=2)
    found = [run_harness(run_of(context_length=1024), ["niah_single_1"], settings) for _ in range(2)]
    prompts = [[sample["prompt_hash"] for sample in one["samples"]["niah_single_1"]] for one in found]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 2
    assert 0 <= found[0]["results"]["niah_single_1"]["1024,none"] <= 1

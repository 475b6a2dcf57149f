"""Whatever a model is made of, its training ends in a report: every memory, aggregation and layer pattern.

Pairwise rather than all with all: what a train step and a read do in each pairing, the core's tests tell.
"""

import dataclasses
import datetime
import json
import subprocess
from typing import get_args

import jax
import pytest

from experiments import paper, quickstart
from mc_jax.config import (
    AggregationName,
    Config,
    DataConfig,
    EvaluationConfig,
    MemoryName,
    Segmentation,
    SegmentInit,
    validate,
)
from mc_jax.data.prepare import prepare
from mc_jax.evaluation.perplexity import evaluate_run
from mc_jax.evaluation.result import commit_of
from mc_jax.evaluation.summary import summarize_run
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.inference.generate import generate_run
from mc_jax.parallel import make_mesh
from mc_jax.training.loop import train
from mc_jax.training.metrics import read_metrics


def _cases() -> dict[str, Config]:
    """A diagonal of the paper's table, Transformer++, and the quickstart with one thing or two turned."""
    members = paper.configs()
    names = ("linear-none", "swla-sparse", "dla-soup", "titans-null", "transformer")
    cases = {f"paper-170m-{name}": members[f"170m-{name}"] for name in names}
    for changes in (
        # With the router's settings left as they are.
        {"layer_pattern": ("attention", "window"), "attention_window": 5},
        {"layer_pattern": ("attention", "memory", "window"), "attention_window": 5, "memory": "delta",
         "aggregation": "residual"},
        {"layer_pattern": ("attention", "memory"), "aggregation": "average", "top_k": 1},
        {"segmentation": "logarithmic", "router_keys": "keys", "online_logit": "running_mean"},
    ):  # fmt: skip
        config = quickstart.config()
        name = " ".join(f"{name}={value}" for name, value in changes.items())
        cases[f"quickstart {name}"] = dataclasses.replace(
            config, model=dataclasses.replace(config.model, **changes)
        )
    return cases


CASES = _cases()


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that tests have: a step for more takes longer to compile."""
    monkeypatch.setattr("mc_jax.training.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("the sea was calm and the wind came from the west. " * 10)
    (folder / "held.txt").write_text("she walked along the shore, she said. " * 2)
    prepare([folder / "text.txt"], folder / "store", held_out=[folder / "held.txt"], tokenizer="bytes")
    return folder / "store"


def _tiny(config: Config, corpus, sample_tokens: int) -> Config:
    """The config with every size made small: four segments of two chunks in a row, two steps."""
    model = dataclasses.replace(
        config.model,
        num_layers=len(config.model.layer_pattern),
        model_dim=8,
        num_heads=2,
        mlp_dim=8,
        segment_length=8,
        chunk_length=4,
    )
    training = dataclasses.replace(
        config.training, steps=2, batch_size=2, warmup_steps=1, checkpoint_every=100
    )
    return validate(
        dataclasses.replace(
            config,
            model=model,
            data=DataConfig(corpus=str(corpus), tokenizer=None, context_length=32),
            training=training,
            evaluation=EvaluationConfig(every=1, tokens=30, batch_size=2, sample_tokens=sample_tokens),
        )
    )


WITHOUT_MEMORY = "paper-170m-transformer"
# What decoding does with each memory and aggregation, tests/inference/test_invariance.py tells: a sample is
# written by those whose layers are mixed, or whose memories are merged, and without memory by `generate_run`.
WRITE_A_SAMPLE = ("'window'", "logarithmic")


@pytest.mark.parametrize("name", CASES)
def test_a_model_trains_to_its_report(name, corpus, tmp_path):
    config = _tiny(CASES[name], corpus, sample_tokens=3 if any(one in name for one in WRITE_A_SAMPLE) else 0)
    assert train(config, tmp_path / "run") == 2
    result = summarize_run(tmp_path / "run")
    assert result is not None
    if name == WITHOUT_MEMORY:
        must_be_measured_and_go_on_with_a_text(tmp_path / "run")
    assert result["tokens"] == 77
    measured = [line["held_out_bits_per_byte"] for line in read_metrics(tmp_path / "run")]
    assert all(0 < bits < 10 for bits in measured)
    assert len(measured) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    words = '<span class="prompt">she walked along the shore, she said. she walked along the</span>'
    assert (words in page) == bool(config.evaluation.sample_tokens), "the sample goes on from held-out text"
    kinds = config.model.layer_pattern
    routed = "memory" in kinds and AGGREGATION_FACTS[config.model.aggregation].uses_router
    assert ("One heat map a layer" in page) == routed
    must_tell_what_the_router_reads(tmp_path / "run", page, routed)
    assert ("no layers with a memory" in page) == ("memory" not in kinds)
    must_tell_what_the_caches_are_worth(config, result, page)


def must_tell_what_the_router_reads(run, page: str, routed: bool) -> None:
    """In each line of metrics with a held-out loss, and at the end the same in the result and the report."""
    lines = read_metrics(run)
    router = json.loads((run / "result.json").read_text())["router"]
    assert ("mean over" in page) == (router is not None) == routed
    for line in lines:
        names = {name for name in line if name.startswith("router_")}
        assert ({"router_cached_share", "router_entropy", "router_entropy_layer_1"} <= names) == routed
        assert routed or not names, "a model without a router has nothing to tell"
    if routed:
        share = router["layers"][0]["cached_share"]
        assert share == pytest.approx(lines[-1]["router_cached_share_layer_1"], rel=1e-5)
        assert 0 < share < 1


def must_tell_what_the_caches_are_worth(config: Config, result, page: str) -> None:
    """Where there are caches, by how much the run's own figure is better than without them."""
    about = AGGREGATION_FACTS[config.model.aggregation]
    has_caches = "memory" in config.model.layer_pattern and about.reads_cache
    assert ("caches_worth" in result) == ("with its caches off" in page) == has_caches
    if has_caches:
        less = result["bits_per_byte_caches_off"] - result["bits_per_byte"]
        assert result["caches_worth"] == pytest.approx(less, abs=1e-9)


def must_be_measured_and_go_on_with_a_text(run) -> None:
    """What a run leaves has no need of memory layers."""
    result = json.loads((run / "result.json").read_text())
    assert result["held_out"] == evaluate_run(run), "mc-jax eval prints what the run found"
    assert result["step"] == 2
    assert result["training"]["loss"] > 0
    assert set(result["hashes"]) == {"config", "checkpoint", "tokenizer", "training_text", "held_out_text"}
    assert all(len(one) == 64 for one in result["hashes"].values()), result["hashes"]
    assert result["versions"]["jax"] == jax.__version__
    assert datetime.datetime.fromisoformat(result["date"]).tzinfo is not None
    text = generate_run(run, "she", tokens=3, temperature=0.0, top_p=1.0, seed=0)
    assert isinstance(text, str)


def test_the_cases_leave_no_memory_aggregation_or_layer_out():
    models = [config.model for config in CASES.values()]
    with_memory = [model for model in models if "memory" in model.layer_pattern]
    for field, names in (
        ("memory", MemoryName),
        ("aggregation", AggregationName),
        ("segmentation", Segmentation),
        ("segment_init", SegmentInit),
    ):
        left_out = set(get_args(names)) - {getattr(model, field) for model in with_memory}
        assert not left_out, f"no case of this file trains {field} {left_out} to its report"


def test_the_commit_is_told_of_a_checkout_alone(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    assert commit_of(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    assert commit_of(tmp_path / "package") is None, "a package within another repository has none"
    (tmp_path / "package" / "file").write_text("2")
    assert commit_of(tmp_path) == commit + "+"

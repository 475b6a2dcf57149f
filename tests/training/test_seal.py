"""A run's settings, tokenizer and text are sealed: what changed under it is refused by name."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest
from run_folders import open_once, train_to, with_training
from workplaces import WORDS

from mc_jax import config as configs
from mc_jax.cli import main
from mc_jax.config import Config, EvaluationConfig, MeshConfig
from mc_jax.data.prepare import prepare
from mc_jax.data.tokenizer import train_bpe
from mc_jax.training import run as runs
from mc_jax.training.checkpoint import Loaded
from mc_jax.training.run import load_run
from mc_jax.training.run_folder import opened
from mc_jax.training.step import TrainState


@pytest.fixture
def own_corpus(corpus, tmp_path):
    """A corpus that a test may spoil."""
    return shutil.copytree(corpus, tmp_path / "corpus")


def of_corpus(config: Config, folder) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=str(folder)))


@pytest.fixture
def sealed(run, config, own_corpus):
    """The settings of a run that has a sealed checkpoint."""
    config = of_corpus(config, own_corpus)
    with opened(run, config, overwrite=False) as folder:
        train_to(run, 10, folder.seal)
    return config


def refused(run, config, told):
    """See that all that open a run refuse it in the same words."""
    with pytest.raises(ValueError, match=told) as in_training:
        open_once(run, config, step=10)
    with pytest.raises(ValueError, match=told) as in_reading:
        load_run(run)
    assert str(in_training.value) == str(in_reading.value)
    assert "\n" not in str(in_training.value)


def edit_config(run, section, **values):
    content = json.loads((run / "config.json").read_text())
    content[section] |= values
    (run / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("section", "name", "value", "was"),
    [
        ("model", "memory", "delta", "linear"),
        ("model", "num_heads", 4, 2),
        ("data", "context_length", 128, 64),
        ("training", "seed", 5, 0),
    ],
)
def test_an_edited_config_json_is_refused_by_name(run, sealed, section, name, value, was):
    edit_config(run, section, **{name: value})
    told = rf"x is no longer what its checkpoint of step 10 was trained with: {section}\.{name} was "
    told += rf"{json.dumps(was)} and is {json.dumps(value)}; restore config\.json, or train under another"
    refused(run, sealed, told)


@pytest.mark.parametrize("text", [WORDS * 30, WORDS[::-1] * 20])
def test_a_corpus_that_was_prepared_anew_is_refused(run, sealed, tmp_path, text):
    shutil.rmtree(sealed.data.corpus)
    (tmp_path / "other.txt").write_text(text)
    prepare([tmp_path / "other.txt"], sealed.data.corpus, tokenizer="bytes")
    refused(run, sealed, "the training text is another; restore the corpus, or train under another")


def test_a_corpus_that_was_only_moved_goes_on(run, sealed, tmp_path, capsys):
    moved = shutil.move(sealed.data.corpus, tmp_path / "elsewhere")
    assert open_once(run, of_corpus(sealed, moved), step=10) == 40
    assert "data.corpus" in capsys.readouterr().out


def test_a_corpus_of_another_name_is_refused_where_no_seal_tells_that_it_is_the_same(run, config, own_corpus):
    open_once(run, config)
    train_to(run, 10)
    with pytest.raises(ValueError, match=r"data\.corpus .* there, .* here"):
        open_once(run, of_corpus(config, own_corpus), step=10)


def test_another_tokenizer_in_the_run_s_folder_is_refused(run, sealed):
    train_bpe([WORDS * 20], 270).save(run / "tokenizer.json")
    refused(run, sealed, "was prepared with another tokenizer than")


def test_an_embedded_corpus_that_is_tokenized_otherwise_is_refused(run, sealed):
    with opened(run, sealed, overwrite=False) as folder:
        train_to(run, 20, folder.seal | {"tokenizer": "of other merges"})
    refused(run, sealed, "the tokenizer is another; restore tokenizer.json, or train")


def test_what_may_change_is_not_sealed(run, sealed):
    changed = with_training(
        sealed,
        steps=80,
        batch_size=8,
        accumulation=2,
        schedule="constant",
        learning_rate=1e-4,
        remat="blocks",
    )
    evaluation = EvaluationConfig(batch_size=3, sample_tokens=0)
    changed = dataclasses.replace(changed, evaluation=evaluation, mesh=MeshConfig(fsdp=1))
    assert open_once(run, changed, step=10) == 40


def test_a_config_json_that_was_lost_is_written_anew_by_the_command_of_the_seal(run, sealed):
    (run / "config.json").unlink()
    (run / "tokenizer.json").unlink()
    other = dataclasses.replace(sealed, model=dataclasses.replace(sealed.model, memory="delta"))
    with pytest.raises(ValueError, match=r'model\.memory was "linear" and is "delta"'):
        open_once(run, other, step=10)
    open_once(run, sealed, step=10)
    assert configs.from_json((run / "config.json").read_text()) == sealed


def test_a_damaged_seal_leaves_the_one_before(run, sealed):
    train_to(run, 20, {})
    (run / "checkpoints" / "20" / "digest.0.json").write_text("{")
    edit_config(run, "model", memory="delta")
    refused(run, sealed, "its checkpoint of step 10 was trained with: model")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", r"config\.json: a config is an object"),
        ('{"model": 3}', r"config\.json: model is an object with settings, not 3"),
        ('{"model": {"num_layers": "2"}}', r"config\.json: model\.num_layers is '2'; set it to an integer"),
        (
            '{"model": {"layer_pattern": "memory"}}',
            r"config\.json: model\.layer_pattern is 'memory'; set it to one",
        ),
        ("\0\0\0", r"config\.json is not JSON"),
        ("", r"config\.json is not JSON"),
        ("\udcff", r"config\.json is not JSON"),
    ],
)
def test_a_damaged_config_json_is_told_in_a_line(run, sealed, text, told):
    (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=told):
        open_once(run, sealed, step=10)
    with pytest.raises(ValueError, match=told):
        load_run(run)


def test_weights_that_are_not_finite_are_an_error_that_names_another_step(run, config, monkeypatch, capsys):
    open_once(run, config)
    train_to(run, 5)
    train_to(run, 10)
    nan = TrainState({"a": jnp.array([1.0, jnp.nan])}, None, jnp.zeros((), jnp.int32))
    monkeypatch.setattr(runs, "abstract_state", lambda *_: (None, nan))
    monkeypatch.setattr(runs, "load_newest", lambda *_: Loaded(10, nan, None))
    for words in (["eval", str(run), "--json"], ["generate", str(run), "--prompt", "a"]):
        assert main(words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "the weights of step 10" in printed.err
        assert "checkpoints/10 elsewhere, and step 5 is used" in printed.err

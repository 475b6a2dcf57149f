import os
import pathlib
import re
import subprocess
import sys

import pytest

from mc_jax.cli import main


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistake(capsys, *words: str) -> str:
    """The message that `mc-jax WORDS` ends with, after the checks that hold for all mistakes."""
    code = main(words)
    captured = capsys.readouterr()
    assert code == 2, f"mc-jax {' '.join(words)} must end with exit code 2"
    assert captured.out == ""
    assert captured.err.startswith("mc-jax: error: ")
    assert captured.err.count("\n") == 1, f"a mistake is told in one line, not in\n{captured.err}"
    assert not list(pathlib.Path().iterdir()), "a mistake leaves nothing behind"
    return captured.err.removeprefix("mc-jax: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trian", "there is no command 'trian'; did you mean train?"),
        ("train", "which recipe? write mc-jax train RECIPE"),
        ("train --training.steps 3", "which recipe?"),
        ("train quickstrat", "there is no recipe 'quickstrat'; did you mean quickstart?; known are "),
        ("train nowhere/recipe.py", "there is no file nowhere/recipe.py"),
        (
            "train quickstart --model.num-layer 3",
            "--model.num-layer; did you mean --model.num-layers?",
        ),
        (
            "train quickstart --model.num_layer=3",
            "--model.num_layer; did you mean --model.num-layers?",
        ),
        ("train quickstart --num-layers 3", "no option --num-layers; did you mean --model.num-layers?"),
        ("train quickstart -n x", "there is no option -n"),
        ("train quickstart --model.num-layers four", "--model.num-layers: invalid literal for int()"),
        ("train quickstart --model.num-layers", "missing value for argument '--model.num-layers'"),
        ("train quickstart --model.memory liner", "invalid choice 'liner' for argument '--model.memory'"),
        ("train quickstart --evaluation.stride half", "--evaluation.stride: no type matching {None}|INT"),
        ("train quickstart --model.tie-embeddings False", "a switch takes no value"),
        ("train quickstart more", "unexpected argument 'more'"),
        ("train quickstart --name a/b", "--name 'a/b' is no folder's name"),
        ("train quickstart --name ..", "--name '..' is no folder's name"),
        ("train quickstart --training.learning-rate nan", "training.learning_rate is nan"),
        (
            "train quickstart --model.segment-length 100 --model.chunk-length 64",
            "does not divide model.segment_length 100; set model.segment_length to 64 or 128",
        ),
        (
            "train quickstart --data.tokenizer None",
            "data.vocab_size 4096 has no effect",
        ),
        ("eval", "RUN"),
        ("eval --jsn runs/x", "there is no option --jsn; did you mean --json?"),
        ("eval runs/x", "there is no run in runs/x"),
        ("generate runs/x --prompt a", "there is no run in runs/x"),
        ("checkpoints runs/x", "there is no run in runs/x"),
        ("generate runs/x", "--prompt"),
        ("prepare --output x", "no input is named"),
        ("prepare nowhere.txt --output x --tokenizer bytes", "nowhere.txt"),
    ],
)
def test_a_mistake_ends_with_one_line_and_exit_code_2(capsys, words, told):
    assert told in mistake(capsys, *words.split())


@pytest.mark.parametrize("columns", ["30", "200"])
def test_a_mistake_reads_the_same_in_any_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    message = mistake(capsys, "train", "quickstart", "--model.aggregation", "gatd")
    assert "invalid choice 'gatd' for argument '--model.aggregation'. Expected one of ('none'," in message
    assert message.endswith("; see mc-jax train quickstart --help")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def config(:\n", "at line 1: SyntaxError"),
        ("import nowhere_at_all\n", "at line 1: ModuleNotFoundError"),
        ("def config():\n    return 1 / 0\n", "at line 2: ZeroDivisionError"),
        ("x = 1\n", "AttributeError"),
        ("def config():\n    return 3\n", "config() returns int"),
        (
            "from mc_jax.config import *\ndef config():\n    return Config(modle=3)\n",
            "at line 3: TypeError",
        ),
    ],
)
def test_a_recipe_that_fails_names_its_file_and_line(capsys, empty_folder, tmp_path_factory, source, told):
    recipe = tmp_path_factory.mktemp("recipes") / "mine.py"
    recipe.write_text(source)
    message = mistake(capsys, "train", str(recipe))
    assert message.startswith(f"recipe {recipe}")
    assert told in message


def test_mistakes_are_told_before_jax_is_imported(empty_folder):
    """As a program: exit code, one line, no traceback, and at once."""
    script = (
        "import sys; from mc_jax.cli import main; code = main(); "
        "assert 'jax' not in sys.modules, 'jax was imported'; sys.exit(code)"
    )
    words = ["train", "quickstart", "--model.segment-length", "100", "--model.chunk-length", "64"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(empty_folder.iterdir())


def shown_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("prepare", "train", "eval", "generate"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("command", ["prepare", "eval", "generate"])
def test_a_command_has_help(capsys, command):
    text = shown_help(capsys, command)
    assert text.startswith(f"usage: mc-jax {command}")
    assert text.isprintable() or "\x1b" not in text


def test_help_of_train_lists_recipes_and_fields(capsys):
    text = shown_help(capsys, "train")
    assert re.search(r"\n  quickstart +A gated Memory Caching model", text)
    assert "--model.segment-length INT" in text


def test_help_of_a_recipe_shows_its_values(capsys):
    text = shown_help(capsys, "train", "quickstart")
    at = text.index("--model.num-layers INT")
    assert "Number of blocks. (default: 2)" in text[at : at + 200]


@pytest.fixture
def trained(monkeypatch):
    """What the training loop is called with; nothing is trained."""
    calls = []

    def train(config, run_dir, *, overwrite=False, init=None):
        calls.append((config, str(run_dir), overwrite))
        return config.training.steps

    monkeypatch.setattr("mc_jax.training.loop.train", train)
    monkeypatch.setattr(
        "mc_jax.evaluation.summary.summarize_run", lambda run_dir: {"loss": 1.5, "tokens": 12345}
    )
    return calls


def test_fields_are_overridden_on_the_command_line(capsys, trained):
    words = (
        "train quickstart --model.num_layers 2 --model.no-tie-embeddings --data.tokenizer None "
        "--data.vocab-size=None --training.learning-rate 1e-4 --evaluation.sample-prompt=-x"
    )
    assert main(words.split()) == 0
    ((config, run_dir, overwrite),) = trained
    assert (run_dir, overwrite) == ("runs/quickstart", False)
    assert (config.model.num_layers, config.model.tie_embeddings) == (2, False)
    assert (config.data.tokenizer, config.data.vocab_size) == (None, None)
    assert config.training.learning_rate == 1e-4
    assert config.evaluation.sample_prompt == "-x"
    assert config.model.model_dim == 192, "a field that is not named keeps the recipe's value"
    assert "12,345" in capsys.readouterr().out


def test_a_run_has_the_name_and_folder_that_are_asked_for(trained):
    assert main(["train", "quickstart", "--name=mine", "--runs-dir", "gs://bucket/runs", "--overwrite"]) == 0
    ((_, run_dir, overwrite),) = trained
    assert (run_dir, overwrite) == ("gs://bucket/runs/mine", True)


def test_a_recipe_may_be_a_file(trained, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("recipes") / "mine.py"
    recipe.write_text(
        '"""Mine."""\nfrom mc_jax.config import Config, ModelConfig\n'
        "def config():\n    return Config(model=ModelConfig(num_layers=5))\n"
    )
    assert main(["train", str(recipe)]) == 0
    ((config, run_dir, _),) = trained
    assert (config.model.num_layers, run_dir) == (5, "runs/mine")


def stop_with(monkeypatch, error: BaseException):
    def train(*_, **__):
        raise error

    monkeypatch.setattr("mc_jax.training.loop.train", train)


def test_a_full_disk_is_told_in_one_line(capsys, monkeypatch):
    stop_with(monkeypatch, OSError(28, "No space left on device", "runs/x"))
    assert mistake(capsys, "train", "quickstart") == "runs/x: No space left on device"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """A ValueError that no code of ours raised speaks to nobody in particular."""
    stop_with(monkeypatch, ValueError("not enough values to unpack"))
    with pytest.raises(ValueError, match="unpack"):
        main(["train", "quickstart"])

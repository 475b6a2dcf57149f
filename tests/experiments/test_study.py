"""A study: which trainings it has, what is done again and what is not, and its table by hand."""

import csv
import json
import shlex
import statistics

import pytest

from experiments import study as program
from experiments.studies import Study, caches
from experiments.study import load_study, main, run_study, trainings_of
from mc_jax._arguments import UsageError
from mc_jax._recipes import load_recipe
from mc_jax.cli import main as mc_jax

STUDY = Study(
    recipe="quickstart",
    variants={"none": ("--model.aggregation", "none"), "gated": ()},
    common=("--training.steps", "4"),
    sweep=("--aggregation", "none"),
)
LOSSES = {"none": 2.0, "gated": 1.9}


class Commands:
    """Stands for the programs that a study runs: a result by name and seed, a row for each reading."""

    def __init__(self):
        self.words: list[list[str]] = []
        self.fails: set[str] = set()

    def __call__(self, words):
        self.words.append(list(words))
        return self.train(words) if words[1] == "train" else self.sweep(words)

    def train(self, words):
        name = words[words.index("--name") + 1]
        if name in self.fails:
            return 2
        folder = program.Path(words[words.index("--runs-dir") + 1]) / name
        folder.mkdir(parents=True)
        told = {
            "parameters": 100,
            "training": {"tokens": 2048, "seconds": 90.0},
            "command": shlex.join(words),
        }
        (folder / "result.json").write_text(json.dumps(told))
        return 0

    def sweep(self, words):
        rows = []
        for run in words[2 : words.index("--aggregation")]:
            variant, _, seed = program.Path(run).name.partition("-")
            for is_own in (True, False) if variant == "gated" else (True,):
                loss = LOSSES[variant] + 0.01 * int(seed) ** 2 + (0 if is_own else 0.2)
                settings = dict.fromkeys(("segment_length", "top_k", "segmentation", "context_length"), 8)
                settings |= {"max_cached": None, "state_dtype": None, "mode": "by-position"}
                settings["aggregation"] = variant if is_own else "none"
                place = {"from": 0, "to": 7, "bits_per_byte": loss}
                unscored = {"from": 8, "to": 15, "bits_per_byte": None}
                places = [place, unscored]
                rows.append(
                    {"run": run, **settings, "is_own": is_own, "bits_per_byte": loss, "by_position": places}
                )
        folder = program.Path(words[words.index("--output") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"results": rows}))
        return 0


@pytest.fixture
def commands():
    return Commands()


def run(tmp_path, commands, seeds=(0, 1, 2)):
    return run_study(
        STUDY, trainings_of(STUDY, seeds, tmp_path), tmp_path, command="the command", call=commands
    )


def test_what_is_done_is_not_done_again_and_a_longer_study_adds_its_seeds(tmp_path, commands):
    assert run(tmp_path, commands, seeds=(0,)) == 0
    assert [words[1] for words in commands.words] == ["train", "train", "sweep"]
    assert run(tmp_path, commands, seeds=(0, 1)) == 0
    assert [words[1] for words in commands.words[3:]] == ["train", "train", "sweep"]
    assert all("--training.seed 1" in shlex.join(words) for words in commands.words[3:5])


def test_places_of_which_no_token_is_scored_have_no_column(tmp_path, commands):
    assert run(tmp_path, commands) == 0
    table = (tmp_path / "study.md").read_text()
    assert "0 to 7" in table
    assert "8 to 15" not in table


def test_a_training_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path, commands, capsys):
    commands.fails = {"gated-1"}
    assert run(tmp_path, commands, seeds=(0, 1)) == 2
    assert "gated with seed 1 has no result" in capsys.readouterr().err
    assert "not every variant has every seed" in (tmp_path / "study.md").read_text()
    commands.fails, commands.words = set(), []
    assert run(tmp_path, commands, seeds=(0, 1)) == 0
    assert [words[1] for words in commands.words] == ["train", "sweep"]


def test_a_variant_begins_with_the_weights_of_another_of_its_seed_once_that_has_ended(
    tmp_path, commands, capsys
):
    study = Study(
        recipe="quickstart",
        variants={"none": (), "gated": ("--training.steps", "2")},
        begins_with={"gated": "none"},
        sweep=STUDY.sweep,
    )
    trainings = trainings_of(study, (0, 1), tmp_path)
    assert f"--init {tmp_path / 'none-1'}" in shlex.join(trainings[3].words)
    assert "--init" not in trainings[2].words
    commands.fails = {"none-1"}
    assert run_study(study, trainings, tmp_path, command="", call=commands) == 2
    trained = [words[words.index("--name") + 1] for words in commands.words if words[1] == "train"]
    assert trained == ["none-0", "gated-0", "none-1"], "what needs a run that failed is not tried"
    told = capsys.readouterr().err
    assert "none with seed 1 has no result" in told
    assert "gated with seed 1 has no result" in told
    commands.fails = set()
    assert run_study(study, trainings, tmp_path, command="", call=commands) == 0


def test_a_run_of_another_command_is_no_part_of_a_study(tmp_path, commands):
    run(tmp_path, commands, seeds=(0,))
    other = Study(recipe="quickstart", variants=STUDY.variants, common=("--training.steps", "5"))
    with pytest.raises(UsageError, match=r"was made by .*steps 4.*delete it"):
        run_study(other, trainings_of(other, (0,), tmp_path), tmp_path, command="", call=commands)


def test_a_table_has_the_mean_and_spread_over_seeds_and_differences_of_pairs(tmp_path, commands):
    run(tmp_path, commands)
    text = (tmp_path / "study.md").read_text()
    gated = [1.90, 1.91, 1.94]
    spread = f"{statistics.mean(gated):.4f} ± {statistics.stdev(gated):.4f}"
    assert f"| gated | as trained | 100 | 2,048 | 1.5 | {spread} | 1.9000 1.9100 1.9400 |" in text
    assert "| -0.1000 ± 0.0000 |  |" in text, "pairs of one seed differ by as much, whatever the seed"
    assert "| gated | aggregation none |" in text
    assert "| +0.1000 ± 0.0000 | +0.2000 ± 0.0000 |" in text, "caches off: less none, less as trained"
    assert f"| variant | read | 0 to 7 |\n|---|---|---|\n| none | as trained | {2.05 / 3 + 4 / 3:.4f}" in text
    assert "Not alike" not in text
    rows = list(csv.DictReader((tmp_path / "study.csv").open()))
    assert len(rows) == 3 * 3
    assert {row["variant"] for row in rows} == {"none", "gated"}


def test_a_sweep_that_is_refused_leaves_no_table_of_an_earlier_one(tmp_path, commands, monkeypatch):
    run(tmp_path, commands, seeds=(0,))
    (tmp_path / "study.md").unlink()
    monkeypatch.setattr(commands, "sweep", lambda words: 2)
    assert run(tmp_path, commands, seeds=(0, 1)) == 2
    assert not (tmp_path / "study.md").exists()


@pytest.mark.parametrize("file", sorted(program.Path(program.studies.__file__).parent.glob("[!_]*.py")))
def test_a_study_s_commands_are_ones_that_mc_jax_knows(file, tmp_path, capsys):
    _, found = load_study(file.stem)
    load_recipe(found.recipe)
    for training in trainings_of(found, (0,), tmp_path):
        # An option that is not there is told before the name, which is none, is refused.
        assert mc_jax([*training.words[1:], "--name", ".."]) == 2
        assert "is no folder's name" in capsys.readouterr().err
    assert mc_jax(["sweep", str(tmp_path / "no"), *found.sweep, "--output", "x"]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_what_cannot_be_meant_is_one_line(tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text("def study():\n    return 3\n")
    for words, told in (
        (["cache"], "did you mean caches"),
        (["caches", "--seeds", "1", "1"], "name each once"),
        ([str(bad)], "let it return a Study"),
        ([str(tmp_path / "no.py")], "there is no file"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path, capsys):
    assert main(["caches", "--seeds", "0", "--runs-dir", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["train"] * len(caches.study().variants) + ["sweep"]
    assert not list(tmp_path.iterdir())

"""A command on a page for users is one that is taken: by mc-jax's parser, by a script, or as a known program.

XPK's and SkyPilot's own parsers read their lines in scripts/launch/validate.
"""

import importlib
import importlib.util
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from pages import PAGES, ROOT, Command, all_commands, commands
from typed import parse_main, parse_mc_jax

# Programs of others, whose options are not known here.
FOREIGN = {"docker", "gcloud", "tensorboard", "xpk"}


def check(command: Command, folder: pathlib.Path) -> None:
    """Fail where a command would be refused."""
    program, *words = command.words
    match program:
        case "mc-jax":
            parse_mc_jax(words)
        case "scripts/train":
            parse_mc_jax(["train", *(words or ["quickstart"])])
        case "scripts/launch/gke":
            parse_mc_jax(what_gke_starts(words, folder))
        case "python" if words[1] == "mc_jax.evaluation.harness":
            check_lm_eval(words[2:])
        case "python":
            assert words[0] == "-m", command
            parse_main(importlib.import_module(words[1]).main, words[2:])
        case "sky":
            check_sky(words)
        case "sbatch":
            script = next(word for word in words if word.endswith(".sbatch"))
            assert (ROOT / script).is_file(), command
            parse_mc_jax(["train", *words[words.index(script) + 1 :]])
        case "source":
            assert words == [".venv/bin/activate"], command
        case "scripts/setup":
            missing = set(words) - additions()
            assert not missing, f"{command.where}: pyproject.toml has neither extra nor group {missing}"
        case _ if program.startswith("scripts/"):
            assert os.access(ROOT / program, os.X_OK), f"{command.where}: there is no program {program}"
        case _:
            assert program in FOREIGN, f"{command.where}: tell this test how to check {program!r}"
            for word in words:
                assert not word.startswith("scripts/") or (ROOT / word).is_file(), f"{command.where}: {word}"


def what_gke_starts(words: list[str], folder: pathlib.Path) -> list[str]:
    """The words of mc-jax that the launcher hands to XPK, here a program that tells its last argument."""
    stub = folder / "xpk"
    stub.write_text('#!/usr/bin/env bash\nprintf %s "${*: -1}"\n')
    stub.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / "launch" / "gke", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.partition(" mc-jax ")[2])


def check_lm_eval(words: list[str]) -> None:
    """Have lm-eval's own parser read its options, where it is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return
    cli = importlib.import_module("lm_eval._cli").HarnessCLI()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lm_eval", *words])
        try:
            assert cli.parse_args().model == "mc_jax", words
        except SystemExit:
            pytest.fail(f"lm-eval refuses {shlex.join(words)}")


def additions() -> set[str]:
    """The extras and groups of pyproject.toml, which scripts/setup adds."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["project"]["optional-dependencies"].keys() | settings["dependency-groups"].keys()


def check_sky(words: list[str]) -> None:
    """See that a task's file is there, and that each of its placeholders, and nothing else, is filled in."""
    for file in (word for word in words if word.endswith(".yaml")):
        envs = yaml.safe_load((ROOT / file).read_text())["envs"]
        given = {word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--env"}
        assert {name for name, value in envs.items() if value is None} <= given <= set(envs), words


def test_commands_are_taken(tmp_path):
    found = all_commands()
    assert len(found) > 30, "the pages' commands are not found"
    for command in found:
        try:
            check(command, tmp_path)
        except (pytest.fail.Exception, AssertionError) as error:
            pytest.fail(f"{command.where}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_of_the_environment_are_called_in_it(page):
    """Neither uv need be on PATH, nor is mc-jax a package of an index."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\buv (run|sync|pip)|pip install .?mc-jax", text), (
        "say source .venv/bin/activate, scripts/setup"
    )
    programs = [command.words[0] for command in commands(page)]
    own = [place for place, program in enumerate(programs) if program in ("mc-jax", "python", "pytest")]
    assert not own or "source" in programs[: own[0]], "without source .venv/bin/activate it is not found"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_site_lists_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [next(iter(entry.values())) for entry in site["nav"]]
    pages = [str(page.relative_to(ROOT / site["docs_dir"])) for page in PAGES if page.parent != ROOT]
    assert sorted(listed) == sorted(pages), "name the new page in mkdocs.yml"


def test_python_on_pages_runs():
    for page in PAGES:
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            exec(compile(block, str(page.relative_to(ROOT)), "exec"), {})

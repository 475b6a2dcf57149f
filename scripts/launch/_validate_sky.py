"""SkyPilot's own check of scripts/launch/sky_*.yaml; run by scripts/launch/validate."""

import pathlib
import subprocess
import sys
from typing import Any

import sky
import yaml
from sky.client.cli.command import cli

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "tests"))
from pages import all_commands  # noqa: E402

ENVS = {"NAME": "a-run", "RECIPE": "quickstart", "RUNS_DIR": "gs://bucket/runs"}


def main() -> None:
    """Load the tasks; a line each."""
    for file in sorted(HERE.glob("sky_*.yaml")):
        task = sky.Task.from_yaml_config(yaml.safe_load(file.read_text()), env_overrides=list(ENVS.items()))
        # All of task.validate but the resources' prices, which need a network.
        task.validate_name()
        task.validate_run()
        task.expand_and_validate_workdir()
        task.expand_and_validate_file_mounts()
        for script in (task.setup, task.run):
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (resources,) = task.resources
        recovery = resources.job_recovery
        assert recovery["recover_on_exit_codes"] == [143], recovery
        print(f"{file.name}: a valid task of {task.num_nodes} x {resources.accelerators} ({resources.cloud})")
    for words, where in all_commands():
        if words[0] == "sky":
            _parse(cli, words[1:])
            print(f"{where}: sky {' '.join(words[1:3])}: taken by sky")


def _parse(command: Any, words: list[str]) -> None:
    """Let SkyPilot's own parser read a command, whose options must be there; nothing runs."""
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context(command.name, list(words))


if __name__ == "__main__":
    main()

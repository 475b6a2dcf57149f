"""Prompts and responses made of docstrings."""

import json

from experiments.docstrings import main, pairs_in

SOURCE = '''
class Store:
    def put(self, name, value=0):
        """Keep a value under a name. What was there goes.

        More of it.
        """

    def _hidden(self):
        """This one is nobody's business at all."""

    def short(self):
        """Too short."""
'''


def test_a_pair_is_a_head_and_the_first_sentence():
    assert list(pairs_in(SOURCE)) == [
        ("def put(self, name, value=0):\n", '    """Keep a value under a name."""\n')
    ]
    assert list(pairs_in("print 'old'")) == []


def test_the_command_writes_what_prepare_reads_and_overwrites_nothing(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    assert main(["--output", str(file), "--packages", "optax"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) > 50
    assert all(line.keys() == {"prompt", "response"} for line in lines)
    assert main(["--output", str(file)]) == 2
    assert main(["--output", str(tmp_path / "no"), "--packages", "nosuchpackage"]) == 2
    assert "there is no package nosuchpackage" in capsys.readouterr().err

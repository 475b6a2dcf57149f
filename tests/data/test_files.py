"""Files and folders are whole or not there, whatever is cut off."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from mc_jax.data.files import json_text, new_folder, write_json, write_text


def names(folder):
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, failing):
    write_text(tmp_path / "x", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/x'"):
        write_text(tmp_path / "x", "new")
    assert names(tmp_path) == {"x"}
    assert (tmp_path / "x").read_text() == "old"


def test_a_folder_counts_once_all_in_it_is_on_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def sync(opened):
        order.append(os.readlink(f"/proc/self/fd/{opened}").rpartition("/")[2])
        fsync(opened)

    def rename(source, target):
        order.append("renamed")
        replace(source, target)

    with new_folder(tmp_path / "x") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("1")
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", rename)
    end = order.index("renamed")
    assert {"file", "deep", partial.name} <= set(order[:end])
    assert order[end + 1] == tmp_path.name
    assert names(tmp_path) == {"x"}


def test_numbers_that_json_does_not_have_are_null():
    values = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": 3, "e": None, "f": True}}
    assert json.loads(json_text(values)) == {
        "a": [1.5, None, [None]],
        "b": {"c": None, "d": 3, "e": None, "f": True},
    }


WRITER = """
import sys
from pathlib import Path
from mc_jax.data.files import new_folder
with new_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("1")
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    words = [sys.executable, "-c", WRITER, str(tmp_path / "x")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (left,) = names(tmp_path)
        (tmp_path / ".other.12345678.partial").mkdir()
        write_json(tmp_path / "beside" / "x", {})
        with new_folder(tmp_path / "y"):
            assert left in names(tmp_path), "another's folder is none of its business"
        with new_folder(tmp_path / "x"):
            assert left in names(tmp_path), "it is being written"
        writer.kill()
    with new_folder(tmp_path / "x"):
        assert left not in names(tmp_path)
    assert names(tmp_path) == {"x", "y", "beside", ".other.12345678.partial"}

"""After a power cut a disk holds what was flushed to it: the run begins again, and loses no metrics."""

import json
import os
import pathlib

import pytest
from etils import epath
from run_folders import names, open_once, train_to, with_training

from mc_jax.training.metrics import MetricsLog, read_metrics
from mc_jax.training.stages import STAGES_FILE, read_stages

WHOLE = {"config.json", "tokenizer.json", STAGES_FILE}


class Disk:
    """What is on a disk: names once their folder was flushed, content once its file was. The worst case."""

    def __init__(self, root: pathlib.Path, monkeypatch):
        self._root = root
        self._contents: dict[int, bytes] = {}  # by inode
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.flushes = 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._flush)

    def _flush(self, opened: int) -> None:
        self._fsync(opened)
        self.flushes += 1
        path = pathlib.Path(f"/proc/self/fd/{opened}").resolve()
        if path.is_dir():
            entries = {entry.name: (entry.stat().st_ino, entry.is_dir()) for entry in path.iterdir()}
            self._names[path.stat().st_ino] = entries
        elif path.exists():
            self._contents[path.stat().st_ino] = path.read_bytes()
        self.flushed(self.flushes)

    def flushed(self, number: int) -> None:
        """Called after each flush."""

    def cut(self, where: pathlib.Path) -> None:
        """Make the folder that is found after a power cut now."""
        self._copy(self._root.stat().st_ino, where)

    def _copy(self, folder: int, where: pathlib.Path) -> None:
        where.mkdir()
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                self._copy(inode, where / name)
            else:
                (where / name).write_bytes(self._contents.get(inode, b""))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    return Disk(tmp_path / "disk", monkeypatch)


def cuts_while(disk, tmp_path, act) -> list[epath.Path]:
    """The folders that are found after a cut at each flush while something is done, and after it."""
    places = []

    def cut(number):
        places.append(tmp_path / f"cut {number}")
        disk.cut(places[-1])

    disk.flushed = cut
    act()
    disk.flushed = lambda _: None
    assert len(places) >= 4, "it must flush, or this shows nothing"
    return [epath.Path(place) / "runs" / "x" for place in places]


def test_a_run_begins_again_after_a_cut_anywhere_while_its_folder_is_made(disk, tmp_path, config):
    run = epath.Path(tmp_path / "disk" / "runs" / "x")
    found = cuts_while(disk, tmp_path, lambda: open_once(run, config))
    assert {"config.json", "tokenizer.json", STAGES_FILE} <= names(found[-1]), (
        "what was said to be done is there"
    )
    for folder in found:
        open_once(folder, config)
        assert {"config.json", "tokenizer.json", STAGES_FILE} <= names(folder)


def test_settings_that_change_are_the_old_or_the_new_ones_after_a_cut(disk, tmp_path, config):
    run = epath.Path(tmp_path / "disk" / "runs" / "x")
    open_once(run, config)
    longer = with_training(config, steps=80, batch_size=8)
    train_to(run, 40)
    found = cuts_while(disk, tmp_path, lambda: open_once(run, longer, step=40))
    for folder in found:
        train_to(folder, 40)
        assert open_once(folder, longer, step=40) == 160
        assert [stage.batch_size for stage in read_stages(folder).stages] == [4, 8]
    for folder in found:
        assert open_once(folder, config, step=40) == 160, "and back, should it be sent again"


def test_metrics_up_to_a_checkpoint_are_there_after_a_cut(disk, tmp_path):
    run = epath.Path(tmp_path / "disk" / "runs" / "x")

    def write():
        with MetricsLog(run, 0, checkpoint_every=3) as log:
            for step in range(1, 12):
                log.write({"step": step, "loss": 1.0})
                if step % 3 == 0:  # a checkpoint counts now
                    disk.cut(tmp_path / f"at {step}")

    write()
    for step in (3, 6, 9):
        lines = read_metrics(tmp_path / f"at {step}" / "runs" / "x")
        assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert json.loads(run.joinpath("metrics.jsonl").read_text().splitlines()[-1])["step"] == 11

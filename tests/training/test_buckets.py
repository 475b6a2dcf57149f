"""Runs in buckets: an object is written whole, and its path is no folder's."""

import dataclasses
import importlib
import os
import pathlib
import tarfile
import warnings

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from run_folders import names, open_once

from mc_jax.data.dataset import open_data
from mc_jax.training import checkpoint, lock, metrics, run_folder
from mc_jax.training._buckets import GrowingFile
from mc_jax.training.checkpoint.digest import (
    DamagedError,
    Digest,
    hash_own_files,
    read_digests,
    verify,
    write_digest,
)
from mc_jax.training.checkpoint.folder import Kind, delete_step, keep_digests_after, kind_of, steps_in
from mc_jax.training.checkpoint.reading import saved_shapes
from mc_jax.training.initial import Init, examine, find_source, must_be_there, settings_of, weights
from mc_jax.training.metrics import MetricsLog, read_metrics

GOLDEN = pathlib.Path(__file__).parent / "golden_run.tar.xz"


class Bucket(MemoryFileSystem):
    """A bucket in memory, with gcsfs's ways: it takes the mode "a" for "w"."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def _open(self, path, mode="rb", **options):
        if "a" in mode:
            warnings.warn("append mode is not supported in a bucket", stacklevel=2)
            mode = mode.replace("a", "w")
        return super()._open(path, mode, **options)

    def glob(self, path, **options):
        """Paths that begin with the bucket's name."""
        return [found.lstrip("/").removeprefix("gs:/") for found in super().glob(path, **options)]


@pytest.fixture
def bucket(monkeypatch):
    """A folder gs://bucket/run, for as long as a test takes."""
    registry = importlib.import_module("fsspec.registry")._registry
    for name in Bucket.protocol:
        monkeypatch.setitem(registry, name, Bucket)
    Bucket.clear_instance_cache()
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return epath.Path("gs://bucket/run")


def test_a_file_in_a_bucket_keeps_what_it_held(bucket):
    path = bucket / "lines"
    path.parent.mkdir(parents=True)
    for text in ("one\n", "two\n"):
        file = GrowingFile(path)
        file.write(text)
        file.close()
    assert path.read_text() == "one\ntwo\n"


def test_a_bucket_is_written_to_now_and_then_and_at_the_end(bucket):
    bucket.mkdir(parents=True)
    file = GrowingFile(bucket / "lines", seconds=3600)
    for text in "abc":
        file.write(text)
    assert (bucket / "lines").read_text() == "a", "the first text is shown at once, the next an hour later"
    file.close()
    assert (bucket / "lines").read_text() == "abc"


def test_a_resumed_run_in_a_bucket_has_one_line_a_step(bucket, monkeypatch):
    class NoTensorBoard:
        def __init__(self, *_): ...
        def write(self, *_): ...
        def close(self): ...

    monkeypatch.setattr(metrics, "EventFile", NoTensorBoard)
    with MetricsLog(bucket, start_step=0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 2.0})
    with MetricsLog(bucket, start_step=3) as log:
        log.write({"step": 4, "loss": 1.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(bucket)] == [(1, 2), (2, 2), (3, 2), (4, 1)]


@pytest.mark.parametrize(
    ("run", "folder"),
    [("gs://bucket/run", "gs://bucket/run/checkpoints"), ("runs/x", "{here}/runs/x/checkpoints")],
)
def test_checkpoints_go_to_the_run_s_folder(monkeypatch, tmp_path, run, folder):
    monkeypatch.chdir(tmp_path)
    with checkpoint.Checkpoints(epath.Path(run)) as checkpoints:
        assert str(checkpoints.folder) == folder.format(here=tmp_path.resolve())


def test_a_checkpoint_in_a_bucket_is_held_against_its_digest_and_deleted(bucket):
    for name in ("_CHECKPOINT_METADATA", "state/d/1", "state/ocdbt.process_1/d/2"):
        (bucket / "5" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "5" / name).write_text(f"what {name} holds")
    keep_digests_after(bucket, 0)
    assert (steps_in(bucket), kind_of(bucket, 5)) == ([5], Kind.UNFINISHED)
    for process in (0, 1):
        assert kind_of(bucket, 5) is Kind.UNFINISHED, "each process has a digest"
        files = hash_own_files(bucket / "5", process, 2)
        assert len(files) == 2 - process, "it hashes what it wrote"
        write_digest(bucket / "5", Digest(5, process, 2, files, 1.0, None))
    assert kind_of(bucket, 5) is Kind.SAVED
    verify(bucket / "5", read_digests(bucket / "5"))
    (bucket / "5" / "state/d/1").write_text("what state/d/1 Holds")
    with pytest.raises(DamagedError, match="state/d/1 holds other bytes than were saved"):
        verify(bucket / "5", read_digests(bucket / "5"))
    delete_step(bucket, 5)
    assert steps_in(bucket) == []


def test_a_lock_in_a_bucket_is_an_object_that_its_holder_keeps_writing(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_SECONDS_TO_COLLIDE", 0.02)
    patience = {"between_beats": 0.02, "to_die": 0.5}
    with lock.RunLock(bucket, **patience) as held:
        held.check()
        told = rf"^process {os.getpid()} on .* trains gs://bucket/run; wait"
        refused = pytest.raises(ValueError, match=told)
        with refused, lock.RunLock(bucket, **patience):
            pass
        held.check()
        (bucket / lock.LOCK_FILE).unlink()
        held._beats.join(timeout=5)
        with pytest.raises(ValueError, match="was deleted or moved while it trained"):
            held.check()
    (bucket / lock.LOCK_FILE).write_text('{"host": "a host that died", "pid": 1, "since": "then"}')
    with lock.RunLock(bucket, between_beats=0.02, to_die=0.05):
        pass
    assert not (bucket / lock.LOCK_FILE).exists()


def test_a_run_in_a_bucket_is_begun_gone_on_with_and_overwritten(bucket, config, monkeypatch):
    monkeypatch.setattr(lock, "_SECONDS_TO_COLLIDE", 0.0)
    monkeypatch.setattr(run_folder, "newest_seal", lambda _: None)
    files = {"config.json", "tokenizer.json", "stages.json"}
    for overwrite in (False, False, True, True):
        assert open_once(bucket, config, overwrite=overwrite) == 0
        assert names(bucket) == files


def test_a_run_in_a_bucket_is_found_checked_and_begun_with(bucket, config, tmp_path, monkeypatch):
    there = tmp_path / "golden"
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(there, filter="data")
    for file in (file for file in there.rglob("*") if file.is_file()):
        copy = bucket / str(file.relative_to(there))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    # Orbax reads buckets past fsspec.
    monkeypatch.setattr(
        weights, "saved_shapes", lambda folder: saved_shapes(epath.Path(there) / "checkpoints" / folder.name)
    )
    for path, kind in ((bucket, "run folder"), (bucket / "checkpoints" / "3", "checkpoint")):
        assert settings_of(str(path), None).model == find_source(there).config.model
        source = find_source(path)
        dataset = open_data(config.data, None)
        new = dataclasses.replace(config, model=source.config.model)
        provenance = examine(Init(path=str(path)), new, dataset)
        assert (provenance.kind, provenance.run, provenance.step) == (kind, "gs://bucket/run", 3)
        assert provenance.summary().startswith(f"{path} ({kind}, step 3): weights alone")
        must_be_there(provenance)
    file = bucket / "checkpoints" / "3" / "state" / "_METADATA"
    file.write_text("{}")
    with pytest.raises(ValueError, match="step 3 is no use"):
        examine(Init(path=str(bucket)), new, dataset)

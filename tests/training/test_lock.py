"""One training at a time writes to a run's folder."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
from run_folders import names, open_once, train_to

from mc_jax.training import lock as locks
from mc_jax.training.lock import LOCK_FILE, RunLock
from mc_jax.training.run_folder import opened

HOLDER = """
import fcntl, json, os, socket, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": "now", "nonce": "a"}, file)
    file.flush()
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(run):
    """Another process that holds the lock."""
    run.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-S", "-c", HOLDER, os.fspath(run / LOCK_FILE)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_training_of_a_name_is_refused_and_loses_nothing(run, config, overwrite):
    open_once(run, config)
    train_to(run, 10)
    with held_elsewhere(run) as holder:
        before = {name: (run / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
        with pytest.raises(ValueError, match=rf"^process {holder.pid} on .* trains .*x; wait until it ends"):
            open_once(run, config, overwrite=overwrite)
        assert {name: (run / name).read_bytes() for name in before} == before
        assert (run / LOCK_FILE).exists()
    open_once(run, config)


def test_a_killed_holder_s_lock_is_free_at_once(run, config):
    with held_elsewhere(run) as holder:
        holder.kill()
        holder.wait()
        assert (run / LOCK_FILE).exists()
        open_once(run, config)
    assert LOCK_FILE not in names(run)


def no_flock(*_):
    raise OSError(errno.ENOTSUP, "no locks here")


def written_by_another_host(run):
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK_FILE).write_text(json.dumps({"host": "node7", "pid": 3, "since": "then", "nonce": "a"}))


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_holder_on_another_host_that_no_longer_beats_is_dead(run, monkeypatch, capsys, has_flock):
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    written_by_another_host(run)
    with RunLock(run, between_beats=0.02, to_die=0.1):
        assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert "process 3 on node7 (since then) had" in capsys.readouterr().out


def test_a_holder_that_beats_is_alive_where_there_is_no_flock(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    second = RunLock(run, between_beats=0.02, to_die=1.0)
    refused = pytest.raises(ValueError, match=rf"^process {os.getpid()} on .* trains")
    with RunLock(run, between_beats=0.02, to_die=1.0), refused, second:
        pass
    assert not run.exists(), "an empty folder that the lock made goes with it"


def test_a_holder_that_slept_notices_who_took_over(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with RunLock(run, between_beats=0.02, to_die=1.0) as lock:
        lock.check()
        written_by_another_host(run)
        lock._beats.join(timeout=5)
        with pytest.raises(ValueError, match=r"^process 3 on node7"):
            lock.check()
    assert (run / LOCK_FILE).exists(), "the other's lock stays"


def test_a_run_in_a_folder_that_was_deleted_or_moved_ends_in_one_line(run, config):
    with opened(run, config, overwrite=False) as folder:
        folder.check()
        run.rename(run.parent / "y")
        with pytest.raises(ValueError, match="x was deleted or moved while it trained"):
            folder.check()


def test_beats_confirm_the_holder_without_a_second_file(run):
    with RunLock(run, between_beats=0.01, to_die=1.0) as lock:
        first = (run / LOCK_FILE).read_text()
        assert not locks._now() < json.loads(first)["refreshed"]
        lock.check()
        assert names(run) == {LOCK_FILE}

"""What counts as a checkpoint, when it begins to, and what saving leaves behind."""

import json
import os
import pathlib
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mc_jax.training.checkpoint import Checkpoints, digest, load_newest
from mc_jax.training.checkpoint.reading import read_seal
from mc_jax.training.step import TrainState

FINE = {"loss": jnp.float32(2.0), "grad_norm": jnp.float32(1.0)}


def state_of(step: int, value: float = 1.0) -> TrainState:
    return TrainState({"w": jnp.full((300,), value)}, {"mu": jnp.arange(6.0) * step}, jnp.int32(step))


@pytest.fixture
def run(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / "run"


def newest(run: epath.Path) -> int | None:
    loaded = load_newest(run, state_of(0))
    if loaded is None:
        return None
    assert int(loaded.state.step) == loaded.step
    return loaded.step


def steps(run: epath.Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def train(run: epath.Path, last: int, **options) -> None:
    """Save each step up to the last one, as the loop does: the step before is confirmed when one is saved."""
    with Checkpoints(run, **options) as checkpoints:
        loaded = checkpoints.restore(state_of(0))
        for step in range(1 + (loaded.step if loaded else 0), last + 1):
            checkpoints.confirm(step - 1)
            checkpoints.save(step, state_of(step), FINE)


def test_the_newest_stay_and_come_back_with_their_seal(run):
    train(run, 5, keep=2, seal={"text": "abc"})
    assert steps(run) == ["4", "5"]
    loaded = load_newest(run, state_of(0))
    assert loaded is not None
    assert (loaded.step, loaded.seal) == (5, {"text": "abc"})
    jax.tree.map(np.testing.assert_array_equal, loaded.state, state_of(5))
    assert read_seal(run / "checkpoints", 4) == {"text": "abc"}


def test_only_steps_of_the_interval_are_saved_and_the_last_one(run):
    with Checkpoints(run, every=3) as checkpoints:
        checkpoints.restore(state_of(0))
        for step in range(1, 8):
            checkpoints.save(step, state_of(step), FINE, force=step == 7)
    assert steps(run) == ["3", "6", "7"]


def test_a_checkpoint_of_another_model_is_told_in_a_line_and_no_older_one_is_tried(run, capfd):
    train(run, 2)
    other = state_of(0)._replace(parameters={"w": jnp.zeros(7)})
    with pytest.raises(ValueError, match="checkpoints/2 is whole, but not of the model"):
        load_newest(run, other)
    assert capfd.readouterr().err == ""


def test_a_step_is_held_back_until_the_next_loss_is_finite(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(state_of(0))
        checkpoints.save(1, state_of(1), FINE)
        checkpoints.confirm(1)
        checkpoints.save(2, state_of(2), FINE)  # waits for all work on step 1
        assert newest(run) is None, "the loss of step 2 was computed from step 1, and is not known"
        checkpoints.confirm(2)
        checkpoints.save(3, state_of(3), FINE)
        assert newest(run) == 1
    assert newest(run) == 3, "of the last step its own loss is enough"


def test_what_a_kill_left_without_digest_is_deleted_by_the_next_training(run, capfd):
    train(run, 2)
    (run / "checkpoints" / "2" / "digest.0.json").rename(run / "digest")
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "1.deleted").mkdir()
    assert newest(run) == 1
    assert "step 2 is no use (it has no digest: it is being written, or was cut off); step 1 is used" in (
        capfd.readouterr().err
    )
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(state_of(0)) is not None
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "digests-after-0"]
        checkpoints.save(2, state_of(2), FINE)
    assert newest(run) == 2


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew_and_nothing_is_lost(run):
    train(run, 1)
    (run / "checkpoints" / "1" / "digest.0.json").unlink()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(state_of(0)) is None
        assert (run / "checkpoints" / "1.damaged" / "state").exists()
        checkpoints.save(1, state_of(1), FINE)
    assert newest(run) == 1


@pytest.mark.parametrize("where", ["loss", "grad_norm", "parameters", "optimizer"])
def test_what_is_not_finite_pushes_nothing_out_and_the_good_step_is_named(run, where):
    bad, metrics = state_of(2), dict(FINE)
    if where in metrics:
        metrics[where] = jnp.float32("nan")
    else:
        broken = jax.tree.map(lambda x: x.at[1].set(jnp.inf), getattr(bad, where))
        bad = bad._replace(**{where: broken})

    def end_in_it():
        with Checkpoints(run, keep=1) as checkpoints:
            checkpoints.restore(state_of(0))
            checkpoints.save(1, state_of(1), FINE)
            checkpoints.confirm(2)
            checkpoints.save(2, bad, metrics, force=True)

    with pytest.raises(FloatingPointError, match=r"after step 2 .* the checkpoint of step 1 is good") as told:
        end_in_it()
    assert "with a lower --training.learning-rate goes on from it" in str(told.value)
    assert steps(run) == ["1"]
    assert newest(run) == 1


def test_a_loss_that_is_not_finite_condemns_the_state_it_was_computed_from(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(state_of(0))
        for step in (1, 2):
            checkpoints.save(step, state_of(step), FINE)
            checkpoints.confirm(step)
        error = checkpoints.diverged("the loss of step 3 is nan")
    assert "the loss of step 3 is nan; the checkpoint of step 1 is good" in str(error)
    assert newest(run) == 1


def test_one_finite_checkpoint_is_kept_even_if_the_next_loss_is_not(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(state_of(0))
        checkpoints.save(1, state_of(1), FINE)
        checkpoints.confirm(1)
        error = checkpoints.diverged("the loss of step 2 is nan")
    assert "only the checkpoint of step 1 is there, finite but just before it" in str(error)
    assert newest(run) == 1


def test_another_error_loses_no_finished_save(run):
    def fail():
        with Checkpoints(run) as checkpoints:
            checkpoints.restore(state_of(0))
            checkpoints.save(1, state_of(1), FINE)
            raise RuntimeError("the data is gone")

    with pytest.raises(RuntimeError, match="the data is gone"):
        fail()
    assert newest(run) == 1


def test_a_refused_write_is_told_in_a_line_and_the_last_good_step_stays(run, capfd):
    train(run, 1)

    def fill_up():
        with Checkpoints(run) as checkpoints:
            checkpoints.restore(state_of(0))
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                checkpoints.save(2, state_of(2), FINE)
                checkpoints.save(3, state_of(3), FINE)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match="File too large: the checkpoint of step 2 is not saved") as told:
        fill_up()
    assert told.value.filename == str(run / "checkpoints")
    assert "that of step 1 is kept" in str(told.value)
    assert capfd.readouterr().err == "", "no traceback out of a thread"
    with Checkpoints(run) as checkpoints:  # what a thread of Orbax's wrote after the error is cleared away
        loaded = checkpoints.restore(state_of(0))
    assert loaded is not None
    assert loaded.step == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "digests-after-0"]


def test_saving_leaves_no_file_open_and_no_thread(run):
    def in_use() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.restore(state_of(0))
        seen = []
        for step in range(1, 25):
            checkpoints.confirm(step - 1)
            checkpoints.save(step, state_of(step), FINE)
            seen.append(in_use())
    early, late = max(seen[:8]), max(seen[-8:])
    # It leaked three files and a thread each time.
    assert late[0] <= early[0] + 8, f"open files: {[files for files, _ in seen]}"
    assert late[1] <= early[1] + 4, f"threads: {[threads for _, threads in seen]}"


def test_a_digest_names_every_file_and_has_a_hash_of_its_own(run):
    train(run, 1)
    folder = run / "checkpoints" / "1"
    files = {os.path.join(where, name) for where, _, names in os.walk(folder) for name in names}
    written = json.loads((folder / "digest.0.json").read_text())["digest"]
    named = {str(folder / name) for name in written["files"]}
    assert files - named == {str(folder / "digest.0.json")}
    assert written["loss"] == 2.0


def test_all_is_on_the_disk_before_the_digest_makes_it_count(run, monkeypatch):
    on_disk, late = set(), []
    sync, write_text = digest.sync, digest.write_text

    def note(path):
        on_disk.add(str(path))
        sync(path)

    def check(path, text):
        paths = [path.parent.parent, path.parent, *pathlib.Path(path.parent).rglob("*")]
        late.extend(str(missing) for missing in paths if str(missing) not in on_disk)
        write_text(path, text)

    monkeypatch.setattr(digest, "sync", note)
    monkeypatch.setattr(digest, "write_text", check)
    train(run, 2, keep=5)
    assert len(on_disk) > 20
    earlier = [path for path in late if path.endswith(("digest.0.json", "digests-after-0"))]
    assert late == earlier, "a power cut could leave the digest and not these"

"""A checkpoint that is damaged in any way is never read: a line names it, and the one before is used."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest
from etils import epath

from mc_jax.training.checkpoint import Checkpoints, load_newest, reading
from mc_jax.training.step import TrainState

FINE = {"loss": jnp.float32(2.0), "grad_norm": jnp.float32(1.0)}


def state_of(step: int) -> TrainState:
    parameters = {"w": jnp.arange(3000.0) * step, "b": jnp.ones((4, 5))}
    return TrainState(parameters, {"mu": jnp.arange(6.0) + step}, jnp.int32(step))


def save(run: pathlib.Path, *steps: int) -> None:
    with Checkpoints(epath.Path(run), keep=3) as checkpoints:
        checkpoints.restore(state_of(0))
        for step in steps:
            checkpoints.save(step, state_of(step), FINE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with the checkpoints of two steps, not to be changed."""
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, 1, 2)
    return run


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def newest(run: pathlib.Path) -> int | None:
    loaded = load_newest(epath.Path(run), state_of(0))
    if loaded is None:
        return None
    expected = state_of(loaded.step)
    assert jnp.array_equal(loaded.state.parameters["w"], expected.parameters["w"]), "other weights"
    return loaded.step


def files_of(step_folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(step_folder.rglob("*")) if path.is_file()]


def make_old(run: pathlib.Path) -> None:
    """Turn a run into one that was made before digests were kept."""
    for path in [*run.rglob("digest.*.json"), *run.rglob("digests-after-*")]:
        path.unlink()


def flips(data: bytes):
    """Copies of a file, each with one bit of it turned: early, late, and between."""
    for place in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1}):
        yield (
            f"bit {place % 8} of byte {place}",
            data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :],
        )


def cuts(data: bytes):
    yield "empty", b""
    yield "half", data[: len(data) // 2]
    yield "a byte short", data[:-1]


@pytest.mark.parametrize("damages", [flips, cuts])
def test_no_bit_of_no_file_can_turn_and_none_can_be_cut(run, damages, capfd):
    step_folder = run / "checkpoints" / "2"
    tried = 0
    for path in files_of(step_folder):
        data = path.read_bytes()
        for what, damaged in damages(data) if data else ():
            path.write_bytes(damaged)
            name = path.relative_to(step_folder)
            assert newest(run) == 1, f"{what} of {name}"
            (line,) = capfd.readouterr().err.splitlines()
            assert f"step 2 is no use ({name} " in line
            assert line.endswith("; step 1 is used")
            tried += 1
        path.write_bytes(data)
    assert tried > 20
    assert newest(run) == 2, "as it was"


def test_no_file_can_be_gone(run, capfd):
    step_folder = run / "checkpoints" / "2"
    for path in files_of(step_folder):
        path.rename(run / "elsewhere")
        assert newest(run) == 1, f"without {path.relative_to(step_folder)}"
        (line,) = capfd.readouterr().err.splitlines()
        assert "step 2 is no use" in line
        (run / "elsewhere").rename(path)
    assert newest(run) == 2, "as it was"


def test_strange_names_are_passed_by(run, capfd):
    folder = run / "checkpoints"
    (folder / "99999").mkdir()
    for name in ("007", "-3", "3.damaged", "4.orbax-checkpoint-tmp-17", "copy of 2", "٣"):
        (folder / name).mkdir()
    (folder / "77").write_text("a file")
    (folder / "digests-after-x").write_text("")
    assert newest(run) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        "step 99999 is no use (it has no digest: it is being written, or was cut off); step 2 is used" in line
    )


def test_where_none_is_whole_it_is_said_in_a_line_and_nothing_is_begun_anew(run):
    for step in ("1", "2"):
        (run / "checkpoints" / step / "state" / "_METADATA").write_text("")
    before = sorted(run.rglob("*"))
    with pytest.raises(
        ValueError, match=r"has no whole checkpoint: step 1 is no use .*, step 2 is no use"
    ) as told:
        save(run, 3)
    assert "put a copy back, or --overwrite the run" in str(told.value)
    assert sorted(run.rglob("*")) == before


def test_training_goes_on_from_the_whole_one_and_saves_the_damaged_step_anew(run):
    (run / "checkpoints" / "2" / "state" / "_METADATA").write_text("")
    save(run, 2, 3)
    assert newest(run) == 3
    assert (run / "checkpoints" / "2.damaged").is_dir()
    assert (run / "checkpoints" / "2" / "state" / "_METADATA").read_text()


def test_an_old_run_is_read_with_a_line_and_falls_back_where_orbax_sees_the_damage(run, capfd):
    make_old(run)
    assert newest(run) == 2
    assert "step 2 has no digest, being older, so damage would not be seen" in capfd.readouterr().err
    (run / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert newest(run) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert "step 2 is no use (Orbax cannot read it: " in first
    assert "step 1 has no digest" in second
    save(run, 2, 3)
    assert newest(run) == 3
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "checkpoints" / "2" / "digest.0.json").unlink()
    assert newest(run) == 1, "a new step is not taken for an old one"


def test_training_does_not_go_on_from_what_an_old_run_saved_without_a_look(run):
    broken = state_of(3)._replace(optimizer={"mu": jnp.full(6, jnp.nan)})
    save(run, 3)
    shutil.rmtree(run / "checkpoints" / "3")
    reading.ocp.save(run / "checkpoints" / "3", broken._asdict(), checkpointable_name=reading.STATE)
    make_old(run)
    with pytest.raises(
        ValueError, match=r"step 3 .* are not finite, .* move .*/3 elsewhere, and step 2 is used"
    ):
        save(run, 4)


def test_readers_leave_no_trace(run, saved):
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "2" / "state" / "_METADATA").write_text("")

    def picture():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]}

    before = picture()
    assert newest(run) == 1
    assert newest(run.parent / "no run") is None
    assert picture() == before
    assert not (run.parent / "no run").exists()


def test_a_step_deleted_between_looking_and_loading_is_followed_by_the_next(
    run, tmp_path, monkeypatch, capfd
):
    save(shutil.copytree(run, tmp_path / "later"), 3)
    load = reading.ocp.load

    def replace_first(path, *arguments, **options):
        if path.name == "2":
            (tmp_path / "later" / "checkpoints" / "3").rename(run / "checkpoints" / "3")
            shutil.rmtree(path)
        return load(path, *arguments, **options)

    monkeypatch.setattr(reading.ocp, "load", replace_first)
    assert newest(run) == 3
    assert capfd.readouterr().err == ""

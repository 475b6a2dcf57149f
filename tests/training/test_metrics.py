"""A run's record survives kills and resumes."""

import contextlib
import errno
import json
import math
import os
import resource

import numpy as np
import pytest

from mc_jax.training._tensorboard import EventFile
from mc_jax.training.metrics import MetricsLog, read_metrics, record_hparams


def _step(step, loss=2.0):
    return {"step": step, "tokens": step * 64, "loss": loss, "bits_per_byte": loss / math.log(2)}


def test_each_step_is_one_line_that_is_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path / "run", start_step=0) as log:
        log.write(_step(1))
        log.write(_step(2, loss=1.5))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [_step(1), _step(2, loss=1.5)]
    assert read_metrics(tmp_path / "run") == [_step(1), _step(2, loss=1.5)]


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write({"step": np.int32(1), "loss": np.float32(0.5)})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_resumed_run_has_one_line_a_step(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        for step in range(1, 6):
            log.write(_step(step))
    with MetricsLog(tmp_path, start_step=3) as log:
        for step in range(4, 7):
            log.write(_step(step, loss=1.0))
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in metrics] == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0]


def test_a_last_line_that_a_kill_tore_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_step(1)) + "\n" + json.dumps(_step(2))[:17])
    assert read_metrics(tmp_path) == [_step(1)]
    with MetricsLog(tmp_path, start_step=1) as log:
        log.write(_step(2))
    assert read_metrics(tmp_path) == [_step(1), _step(2)]
    assert [p.name for p in tmp_path.glob("*.part")] == [], "the rewrite left its temporary file behind"


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        read_metrics(tmp_path)


def test_zeros_that_a_power_cut_left_are_skipped_and_what_is_lost_is_told(tmp_path, capsys):
    lines = [json.dumps(_step(step)) + "\n" for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + "\0" * 50 + "\n" + lines[4] + "\0" * 99)
    assert read_metrics(tmp_path) == [_step(1), _step(2), _step(5)]
    with MetricsLog(tmp_path, start_step=5) as log:
        log.write(_step(6))
    assert "metrics.jsonl lacks 2 of the 5 steps before the checkpoint" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 5, 6]
    assert "\0" not in (tmp_path / "metrics.jsonl").read_text()


def test_lines_are_on_the_disk_before_the_checkpoint_of_their_step_counts(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def sync(opened):
        if os.readlink(f"/proc/self/fd/{opened}").endswith("metrics.jsonl"):
            synced.append((tmp_path / "metrics.jsonl").read_text().count("\n"))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", sync)
    with MetricsLog(tmp_path, start_step=0, checkpoint_every=5) as log:
        for step in range(1, 13):
            log.write(_step(step))
    assert synced == [5, 10, 12]


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [1000, 1001, 1050])
def test_a_full_disk_is_told_with_the_file_and_leaves_whole_lines(tmp_path, room):
    def write():
        with MetricsLog(tmp_path, start_step=0, checkpoint_every=100) as log:
            for step in range(1, 100):
                log.write(_step(step))

    with full_disk(room), pytest.raises(OSError, match=r"metrics\.jsonl") as raised:
        write()
    assert raised.value.errno == errno.EFBIG
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n"), "no torn line is left"


def test_a_full_disk_ends_the_events_too_instead_of_a_thread_that_all_wait_for(tmp_path):
    def write():
        events = EventFile(str(tmp_path), 0)
        for step in range(1, 1000):
            events.write(step, {"loss": 1.0})

    with full_disk(1000), pytest.raises(OSError, match=r"events\.out") as raised:
        write()
    assert raised.value.errno == errno.EFBIG


def test_numbers_that_are_not_finite_leave_the_file_valid_json(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(_step(1, loss=math.nan))
        log.write(_step(2, loss=math.inf))
    with MetricsLog(tmp_path, start_step=2):
        pass
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text, "NaN is no JSON: write null"
    assert "Infinity" not in text, "Infinity is no JSON: write null"
    assert [math.isnan(line["loss"]) for line in read_metrics(tmp_path)] == [True, True]


def test_tensorboard_is_told_to_drop_what_the_resumed_run_repeats(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for start in (0, 3):
        with MetricsLog(tmp_path, start_step=start) as log:
            log.write(_step(start + 1))
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2, (
        "two openings within one second share an event file: the second overwrites the first"
    )
    events = [Event.FromString(record) for record in _records(files[1].read_bytes())]
    assert [event.step for event in events if event.HasField("session_log")] == [4]
    tags = {value.tag: value.simple_value for event in events for value in event.summary.value}
    assert tags["training/loss"] == 2.0
    assert "training/step" not in tags


def test_settings_and_results_are_told_to_tensorboard_once(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    with MetricsLog(tmp_path, start_step=0) as log:
        log.write(_step(1))
    settings = {"model.memory": "delta", "model.top_k": None, "model.layer_pattern": ("memory",), "data.n": 3}
    record_hparams(tmp_path, settings, {"bits": 9.0}, 5)
    (tmp_path / "tensorboard" / "events.of an older one.hparams").write_bytes(b"")
    record_hparams(tmp_path, settings, {"bits": 1.75, "perplexity": math.inf, "error": None}, 7)
    files = list((tmp_path / "tensorboard").iterdir())
    assert sorted(path.suffix for path in files) == [".from0", ".hparams"], "an earlier result is in the way"
    (file,) = (path for path in files if path.suffix == ".hparams")
    events = [Event.FromString(record) for record in _records(file.read_bytes())]
    values = {value.tag: value for event in events for value in event.summary.value}
    assert values["final/bits"].simple_value == 1.75
    assert "final/perplexity" not in values, "an infinite number is none"
    assert not any(event.HasField("session_log") for event in events), "this would hide later steps"
    content = values["_hparams_/session_start_info"].metadata.plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["model.memory"].string_value == "delta"
    assert told["model.top_k"].string_value == "None"
    assert told["model.layer_pattern"].string_value == "('memory',)"
    assert told["data.n"].number_value == 3


def _records(data):
    """TFRecord framing: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_a_folder_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path) == []

"""Scalars for TensorBoard, written in the thread that has them.

tensorboardX's own writer hands events through a queue to a thread: a full disk ends that thread, and the
training then waits for ever for a place in the queue. Its records are used here, without the thread.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from mc_jax.data.files import named

_SECONDS_BETWEEN_FLUSHES = 30.0
_SUFFIX_OF_HPARAMS = ".hparams"


class EventFile:
    """A file of events that a run adds to its folder each time it is started.

    Args:
      folder: of all event files of the run; made where it is missing.
      start_step: steps behind the checkpoint; TensorBoard hides what older files hold of later ones.
    """

    def __init__(self, folder: str, start_step: int):
        # Imported here: it takes most of a second, which commands that only read metrics need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import directory_check

        self._events = vars(event_pb2)  # classes that are made as they are imported
        self._summaries = vars(summary_pb2)
        directory_check(folder)
        # The suffix keeps two runs that start within one second from writing the same file.
        self._writer = EventsWriter(os.path.join(folder, "events"), f".from{start_step}")
        begin = self._events["SessionLog"](status=self._events["SessionLog"].START)
        self._write(step=start_step + 1, session_log=begin)
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars of a step."""
        summary = self._summaries["Summary"]
        scalars = [
            summary.Value(tag=f"training/{name}", simple_value=value) for name, value in values.items()
        ]
        self._write(step=step, summary=summary(value=scalars))
        if time.monotonic() - self._flushed >= _SECONDS_BETWEEN_FLUSHES:
            with named(self._writer._file_name):
                self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        with named(self._writer._file_name):
            self._writer.close()

    def _write(self, **content: Any) -> None:
        with named(self._writer._file_name):
            self._writer.write_event(self._events["Event"](wall_time=time.time(), **content))


def write_hparams(folder: str, settings: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
    """Write a run's settings and final results for TensorBoard's table of runs, in place of earlier ones.

    Args:
      folder: of all event files of the run; made where it is missing.
      settings: by name; what is no number, text or truth value is written as text.
      results: finite numbers by name, scalars of their own.
      step: at which they were measured.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import directory_check
    from tensorboardX.summary import hparams

    events, summaries = vars(event_pb2), vars(summary_pb2)
    directory_check(folder)
    earlier = [path for path in epath.Path(folder).iterdir() if path.name.endswith(_SUFFIX_OF_HPARAMS)]
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
    }
    scalars = [summaries["Summary"].Value(tag=name, simple_value=value) for name, value in results.items()]
    writer = EventsWriter(os.path.join(folder, "events"), _SUFFIX_OF_HPARAMS)
    with named(writer._file_name):
        for summary in (*hparams(plain, dict(results)), summaries["Summary"](value=scalars)):
            writer.write_event(events["Event"](wall_time=time.time(), step=step, summary=summary))
        writer.close()
    for path in earlier:
        if str(path) != writer._file_name:
            path.unlink()

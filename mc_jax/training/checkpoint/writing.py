"""Saving beside the training: what is finite counts, once it is on the disk with its digest."""

import collections
import contextlib
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Self

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mc_jax.parallel.processes import first_decides
from mc_jax.training.checkpoint.digest import Digest, hash_own_files, write_digest
from mc_jax.training.checkpoint.folder import (
    WITH_DIGEST,
    checkpoints_of,
    clear_after,
    delete_but_newest,
    delete_unfinished,
)
from mc_jax.training.checkpoint.reading import STATE, Loaded, Seal, load_newest, must_be_finite
from mc_jax.training.step import TrainState, all_finite

# TensorStore raises a ValueError for what the system refuses.
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_SECONDS_BETWEEN_LOOKS = 5.0  # at the folder that a save is waited for


class _Held(NamedTuple):
    """A saved step that does not count yet."""

    step: int
    digest: Future[Digest | None]
    """None: not all of it is finite."""


class Checkpoints:
    """The checkpoints that a training writes; a context manager that waits for the last one.

    A saved step is held back until `confirm` tells that the next one's loss was finite, for that was computed
    from what was saved; a training's last step needs its own alone. All numbers saved must be finite as well,
    which the device checks. Only then is its digest written, which makes it count, and an older one deleted.

    Of several processes each writes and hashes what its devices hold, and all must make the same calls.
    Nobody else may train in the folder.
    """

    def __init__(
        self,
        run_dir: epath.Path,
        *,
        every: int = 1,
        keep: int | None = None,
        seal: Seal = None,
        check: Callable[[], None] = lambda: None,
    ):
        """Open the checkpoints of a run; nothing is made before `restore`, which comes first.

        Args:
          run_dir: the run's folder.
          every: steps between saves.
          keep: how many of the newest stay; None: all.
          seal: what the run is made of, to be kept beside each checkpoint.
          check: raises an error once the folder is not ours any more. A save may never end then: where a
            folder is deleted under its writes, TensorStore now and then waits for ever.
        """
        self._run_dir = run_dir
        self.folder = checkpoints_of(run_dir)
        self._every, self._keep, self._seal, self._check = every, keep, seal, check
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: _Held | None = None
        self._held: collections.deque[_Held] = collections.deque()
        self._counting: collections.deque[Future[None]] = collections.deque()
        self._newest: int | None = None  # that counts
        self._is_open = False
        logging.getLogger("absl").addFilter(_is_no_page_of_a_thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self._finish_writing()
                self._count_held()
                if self._is_open and jax.process_count() > 1:
                    multihost_utils.sync_global_devices("all digests are written")
                    self._delete_older()
            else:
                # What was saved before the error is good, unless its numbers are the error.
                if isinstance(error, FloatingPointError):
                    self._held.clear()
                with contextlib.suppress(Exception):
                    self._count_held()
                with contextlib.suppress(Exception):
                    self._wait_for(self._worker.submit(lambda: None))  # for all that it was given before
        finally:
            self._worker.shutdown(wait=False)
            # Another process may still write its digest.
            if self._is_open and jax.process_count() == 1:
                with contextlib.suppress(OSError):
                    delete_unfinished(self.folder)

    def restore(self, like: TrainState) -> Loaded | None:
        """Read the newest whole checkpoint, and clear away what a kill or damage has left of newer ones.

        Arguments and errors are those of `load_newest`; and an older run's numbers must be finite.
        """
        loaded = load_newest(self._run_dir, like)
        if loaded is not None:
            must_be_finite(self._run_dir, loaded, loaded.state)
        start = 0 if loaded is None else loaded.step
        first_decides(lambda: clear_after(self.folder, start))
        self._newest = start or None
        self._is_open = True
        return loaded

    def save(
        self, step: int, state: TrainState, metrics: dict[str, jax.Array], *, force: bool = False
    ) -> None:
        """Begin to save if `step` is one of those that are kept, or if it must be.

        Args:
          step: the finished steps.
          state: the training state after them.
          metrics: "loss" and whatever else of the step must be finite.
          force: save, whatever the step.

        Raises:
          FloatingPointError: what was saved last is not finite.
          OSError: it could not be written.
        """
        if step % self._every and not force:
            return
        assert self._is_open, "restore first"
        self._finish_writing()
        is_finite = all_finite((state, metrics))
        tree: Any = state._asdict()
        try:
            response = ocp.save_async(
                self.folder / str(step), tree, checkpointable_name=STATE, custom_metadata=WITH_DIGEST
            )
        except (ValueError, OSError) as error:
            raise self._of_the_disk(step, error) from error
        job = self._worker.submit(self._write_down, step, response, is_finite, metrics["loss"])
        self._writing = _Held(step, job)
        self._held.append(self._writing)

    def confirm(self, step: int) -> None:
        """Tell that loss and gradient of `step` were finite: what was saved before it counts.

        Raises:
          OSError: an earlier step could not be made to count.
        """
        while self._held and self._held[0].step < step:
            self._count(self._held.popleft())
        while self._counting and self._counting[0].done():
            self._wait_for(self._counting.popleft())

    def diverged(self, what: str) -> FloatingPointError:
        """The error that tells what is not finite, and which step is good.

        Steps held back do not count any more, unless no other would be left: finite they are.
        """
        held, self._held = self._held, collections.deque()
        is_confirmed = True
        with contextlib.suppress(Exception):
            self._count_held()
            if self._newest is None:
                is_confirmed, self._held = False, held
                self._count_held()
        again = "the same command with a lower --training.learning-rate goes on from it"
        if self._newest is None:
            cure = "there is no finite checkpoint before it; lower --training.learning-rate and --overwrite"
        elif is_confirmed:
            cure = f"the checkpoint of step {self._newest} is good, and {again}"
        else:
            cure = f"only the checkpoint of step {self._newest} is there, finite but just before it: {again}"
        return FloatingPointError(f"{what}; {cure}")

    def _write_down(self, step: int, response: Any, is_finite: jax.Array, loss: jax.Array) -> Digest | None:
        """Wait for Orbax, and see that all is finite and on the disk."""
        index, count = jax.process_index(), jax.process_count()
        try:
            response.result()  # which frees Orbax's thread and files, too
            if not is_finite:
                return None
            hashes = hash_own_files(self.folder / str(step), index, count)
        except (ValueError, OSError) as error:
            raise self._of_the_disk(step, error) from error
        return Digest(step, index, count, hashes, float(loss), self._seal)

    def _finish_writing(self) -> None:
        """Wait for the save in hand."""
        if self._writing is not None:
            held, self._writing = self._writing, None
            if self._wait_for(held.digest) is None:
                raise self.diverged(f"not all numbers of the state after step {held.step} are finite")

    def _count(self, held: _Held) -> None:
        """Let the worker write a step's digest, after all it has to do for the step."""

        def count() -> None:
            digest = held.digest.result()
            if digest is None:
                return
            try:
                write_digest(self.folder / str(held.step), digest)
                self._newest = held.step
                self._delete_older()
            except OSError as error:
                raise self._of_the_disk(held.step, error) from error

        self._counting.append(self._worker.submit(count))

    def _count_held(self) -> None:
        """Let all steps held back count, and wait."""
        while self._held:
            self._count(self._held.popleft())
        while self._counting:
            self._wait_for(self._counting.popleft())

    def _wait_for[T](self, job: Future[T]) -> T:
        """Wait for the worker, as long as the folder is ours."""
        while not wait([job], _SECONDS_BETWEEN_LOOKS).done:
            self._check()
        return job.result()

    def _delete_older(self) -> None:
        if self._keep is not None and jax.process_index() == 0:
            delete_but_newest(self.folder, self._keep)

    def _of_the_disk(self, step: int, error: Exception) -> Exception:
        """An error that names the folder, if it is the file system's; else as it is."""
        found = _SYSTEM_ERROR.search(str(error))
        if found:
            number = int(found[1])
        elif isinstance(error, OSError) and error.errno is not None:
            number = error.errno
        else:
            return error
        kept = f"that of step {self._newest} is kept" if self._newest else "there is no earlier one"
        text = f"{os.strerror(number)}: the checkpoint of step {step} is not saved; {kept}"
        return OSError(number, text, str(self.folder))


def _is_no_page_of_a_thread(record: logging.LogRecord) -> bool:
    """Whether it is not a traceback out of Orbax's threads: the error comes to us, and is told in a line."""
    return "_SignalingThread.run() raised" not in str(record.msg)

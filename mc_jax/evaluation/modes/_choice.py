"""A mode by its name, with the windows of a config."""

from mc_jax.caching import Storage
from mc_jax.config import Config
from mc_jax.evaluation.modes._interface import Mode
from mc_jax.evaluation.modes.by_position import ByPosition
from mc_jax.evaluation.modes.last_k import LastK
from mc_jax.evaluation.modes.stream import Stream
from mc_jax.evaluation.modes.windows import Windows
from mc_jax.training.held_out import windows_of

MODES = ("windows", "last-k", "by-position", "stream")


def mode_of(
    config: Config,
    name: str,
    *,
    last_k: int | None = None,
    first: int | None = None,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> Mode:
    """The mode that a command names, in windows, or for "stream" in chunks, of about the config's length.

    Args:
      config: whose data.context_length and evaluation.stride count.
      name: one of `MODES`.
      last_k: targets that a window of "last-k" scores; None: all that are not half a window away.
      first: of "last-k", the place in a document from which on it scores; None: the least there is.
      storage: of "stream", how cached memories are kept.

    Raises:
      ValueError: a name that is not known, or a setting that has no effect on the mode, or does not fit.
    """
    windows = windows_of(config)
    length = windows["context_length"]
    if name != "stream" and storage != Storage():
        raise ValueError(
            f"a storage has no effect in mode {name!r}, which keeps no cache; set mode to stream"
        )
    if name == "last-k":
        k = max(1, length // 2) if last_k is None else last_k
        return LastK(length=length, k=k, first=max(length - k, 0) if first is None else first)
    for option, value in (("last-k", last_k), ("first", first)):
        if value is not None:
            raise ValueError(
                f"{option} {value} has no effect in mode {name!r}; leave it out, or set mode to last-k"
            )
    if name == "stream":
        segment = config.model.segment_length
        return Stream(chunk=-(-length // segment) * segment, storage=storage)
    if name == "windows":
        return Windows(length=length, stride=windows["stride"])
    if name == "by-position":
        return ByPosition(length=length)
    raise ValueError(f"there is no mode {name!r}; choose from {', '.join(MODES)}")

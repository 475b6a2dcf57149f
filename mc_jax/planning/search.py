"""The largest batch and the lightest recomputation that fit a chip, found by compiling."""

import dataclasses
import typing
from collections.abc import Callable

from mc_jax.config import Config, Remat
from mc_jax.planning.plan import Plan, plan

_MOST_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A step that was compiled."""

    remat: Remat
    """What is computed again."""
    rows: int
    """Rows of a batch per chip."""
    total: int
    """Bytes that it needs of a chip."""
    fits: bool
    """Whether the chip has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with."""

    attempts: tuple[Attempt, ...]
    """What was tried, in order."""
    config: Config | None
    """The run with the lightest recomputation that fits its rows on a chip, and as many rows as fit then;
    None: nothing fits."""
    rows: int
    """Rows of a batch per chip; 0: nothing fits."""


def search(
    config: Config,
    *,
    topology: str,
    slices: int = 1,
    vocab_size: int | None = None,
    tell: Callable[[Attempt], None] = lambda attempt: None,
    planner: Callable[..., Plan] = plan,
) -> Found:
    """Find the lightest recomputation that the config's rows on a chip fit with, then the most rows.

    Lighter than "maps" nothing is tried: a step that keeps all takes longer, for it moves more than it saves
    (by the compiler's estimate for 1.3 B parameters on v5p: 0.47 s and not 0.37 s).

    Where they fit with none, the heaviest is kept and rows are taken away. Parts that a batch is cut into
    stay as many as they are: with twice the rows on a chip, each has twice the rows.

    Args:
      config: of the run.
      topology: as in `plan`, like the next two.
      slices: how many.
      vocab_size: of the tokenizer.
      tell: called with each attempt.
      planner: what compiles.

    Raises:
      ValueError: as `plan`.
    """
    trials = _Trials(
        config,
        tell,
        lambda tried: planner(tried, topology=topology, slices=slices, vocab_size=vocab_size, estimate=False),
    )
    policies = typing.get_args(Remat)[1:]
    remat = next((remat for remat in policies if trials.fits(remat, None)), None)
    rows = trials.attempts[0].rows
    if remat is None:
        remat, low, high = policies[-1], 0, rows
    else:
        low, high = rows, 2 * rows
        while trials.fits(remat, high) and high < _MOST_ROWS:
            low, high = high, 2 * high
    # Rows of each part that a batch is cut into are whole numbers.
    unit = config.training.accumulation
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if trials.fits(remat, middle) else (low, middle)
    best = _changed(config, remat, low / rows) if low else None
    return Found(attempts=tuple(trials.attempts), config=best, rows=low)


class _Trials:
    def __init__(self, config: Config, tell: Callable[[Attempt], None], planner: Callable[[Config], Plan]):
        self.attempts: list[Attempt] = []
        self._config, self._tell, self._planner = config, tell, planner

    def fits(self, remat: Remat, rows: int | None) -> bool:
        """Whether as many rows fit on a chip; None: the config's."""
        times = 1.0 if rows is None else rows / self.attempts[0].rows
        found = self._planner(_changed(self._config, remat, times))
        one = Attempt(remat=remat, rows=found.rows, total=found.memory.total, fits=found.memory.fits)
        self.attempts.append(one)
        self._tell(one)
        return one.fits


def _changed(config: Config, remat: Remat, times: float) -> Config:
    batch_size = round(config.training.batch_size * times)
    training = dataclasses.replace(config.training, batch_size=batch_size, remat=remat)
    return dataclasses.replace(config, training=training)

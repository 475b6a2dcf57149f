"""The largest batch and the lightest recomputation that fit a chip, found by compiling."""

import dataclasses
import typing
from collections.abc import Callable

from mc_jax.config import Config, TrainingConfig
from mc_jax.planning.plan import Plan, plan

_MOST_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A step that was compiled."""

    remat: str | None
    """What is computed again; None: nothing can be."""
    rows: int
    """Of a batch, on a chip."""
    total: int
    """Bytes that it needs of a chip."""
    fits: bool
    """Whether the chip has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ends with."""

    attempts: tuple[Attempt, ...]
    """In order."""
    config: Config | None
    """The run with the lightest recomputation that fits its rows on a chip, and as many rows as fit then;
    None: nothing fits."""
    rows: int
    """Of a batch, on a chip; 0: nothing fits."""


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
    attempts: list[Attempt] = []
    first: Plan | None = None
    known: dict[tuple[str | None, int], bool] = {}

    def fits(remat: str | None, rows: int | None) -> bool:
        nonlocal first
        if rows is not None and (remat, rows) in known:
            return known[remat, rows]
        tried = _changed(config, remat, 1 if rows is None or first is None else rows / first.rows)
        found = planner(tried, topology=topology, slices=slices, vocab_size=vocab_size, estimate=False)
        first = first or found
        attempts.append(
            Attempt(remat=remat, rows=found.rows, total=found.memory.total, fits=found.memory.fits)
        )
        tell(attempts[-1])
        known[remat, found.rows] = found.memory.fits
        return found.memory.fits

    policies = remat_policies()
    chosen = next((remat for remat in policies if fits(remat, first.rows if first else None)), None)
    assert first is not None
    fitting = any(attempt.fits for attempt in attempts)
    remat = chosen if fitting else policies[-1]
    # Rows of each part, and rows that a batch is made of, are whole numbers.
    unit = config.training.accumulation
    if fitting:
        low, high = first.rows, None
        while high is None and low < _MOST_ROWS:
            if fits(remat, 2 * low):
                low *= 2
            else:
                high = 2 * low
        high = 2 * low if high is None else high
    else:
        low, high = 0, first.rows
    while high - low > unit:
        middle = (low + high) // 2 // unit * unit
        if fits(remat, middle):
            low = middle
        else:
            high = middle
    return Found(
        attempts=tuple(attempts),
        config=_changed(config, remat, low / first.rows) if low else None,
        rows=low,
    )


def remat_policies() -> tuple[str | None, ...]:
    """Return the values of `training.remat`, the lightest first; (None,) if there is no such setting."""
    hints = typing.get_type_hints(TrainingConfig)
    return typing.get_args(hints["remat"]) if "remat" in hints else (None,)


def _changed(config: Config, remat: str | None, times: float) -> Config:
    changes: dict[str, typing.Any] = {"batch_size": round(config.training.batch_size * times)}
    if remat is not None:
        changes["remat"] = remat
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))

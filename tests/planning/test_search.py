"""A search finds the lightest recomputation that fits, then the most rows: against a planner that adds up."""

import types

import pytest

from mc_jax.config import Config, TrainingConfig
from mc_jax.planning.search import search

CHIPS = 4
BYTES = {"maps": 10, "states": 6, "blocks": 4, "offload": 3}


def found(capacity: int, *, rows: int = 2, accumulation: int = 1):
    def planner(config, **options):
        assert not options["estimate"], "a search wants to know what fits alone"
        assert config.training.batch_size % (CHIPS * accumulation) == 0, "rows are shared evenly"
        count = config.training.batch_size // CHIPS
        total = count * BYTES[config.training.remat]
        return types.SimpleNamespace(
            rows=count, memory=types.SimpleNamespace(total=total, fits=total <= capacity)
        )

    training = TrainingConfig(batch_size=rows * CHIPS, accumulation=accumulation)
    return search(Config(training=training), topology="v5e:2x2", planner=planner)


@pytest.mark.parametrize(
    ("capacity", "remat", "rows"), [(75, "maps", 7), (19, "states", 3), (7, "offload", 2), (4, "offload", 1)]
)
def test_the_lightest_recomputation_that_fits_gets_the_most_rows(capacity, remat, rows):
    result = found(capacity)
    assert result.rows == rows
    assert result.config is not None
    assert (result.config.training.remat, result.config.training.batch_size) == (remat, rows * CHIPS)
    assert len({(one.remat, one.rows) for one in result.attempts}) == len(result.attempts), (
        "none is tried twice"
    )


def test_parts_of_a_batch_stay_whole():
    result = found(70, rows=4, accumulation=4)
    assert result.rows == 4


def test_what_never_fits_is_said():
    result = found(2)
    assert result.config is None
    assert result.rows == 0

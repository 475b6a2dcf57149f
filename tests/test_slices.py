"""A name of chips is taken as the field writes it; what nobody rents is refused before a compiler starts."""

import time

import pytest

from mc_jax.cli import main
from mc_jax.planning.chips import CHIPS, GPUS
from mc_jax.planning.topology import read_topology
from mc_jax.slices import GPU_NAMES, TPU_FAMILIES


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5e:4x4", "v5e:4x4"),
        ("v5e-16", "v5e:4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("tpu-v5litepod-256", "v5e:16x16"),
        ("v5e-4x8", "v5e:4x8"),
        ("v6e-1", "v6e:1x1"),
        ("v6e-256", "v6e:16x16"),
        ("v4-8", "v4:2x2x1"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("V5P-512", "v5p:4x8x8"),
        ("v5p:4x4x12", "v5p:4x4x12"),
        ("tpu7x-2", "tpu7x:1x1x1"),
        ("tpu7x-16", "tpu7x:2x2x2"),
        ("H100:8", "h100:8"),
        ("h100:8", "h100:8"),
        (" b200-16", "b200:16"),
    ],
)
def test_a_name_is_taken_as_the_field_writes_it(name, meant):
    assert read_topology(name).name == meant


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5e:4x4x4", "there are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; write v5e:8x8"),
        ("v6e:4x4x4", "no slice of v6e that is sold is 'v6e:4x4x4'"),
        ("v6e:8x4", "write v6e:4x8"),
        ("v6e-512", "write v6e:16x16"),
        ("v5e:16", "write v5e:4x4, its nearest, or v5e-16"),
        ("v5e-12", "no slice of v5e that is sold is 'v5e-12'"),
        ("v5p:4x4", "write v5p:2x2x4, its nearest, or v5p-32"),
        ("v5p:4x4x2", "ascending multiples of 4 up to 8,960 chips, such as 4x4x4, 4x4x8; write v5p:2x4x4"),
        ("v5p:1x1x1", "write v5p:2x2x1"),
        ("v5p:4x4x6", "no slice of v5p that is sold is 'v5p:4x4x6'"),
        ("v5p-127", "write v5p:4x4x4, its nearest, or v5p-128"),
        ("v4:16x16x20", "up to 4,096 chips"),
        ("v5p:99999999999x4x4", "no slice of v5p that is sold is"),
        ("v5q:4x4", "there is no chip 'v5q' in topology 'v5q:4x4'; known are v4,"),
        ("pod", "there is no topology 'pod'; write CHIP:SIZES, such as v5e:4x4"),
        ("v5e:", "there is no topology 'v5e:'"),
        ("v5e:0x4", "topology 'v5e:0x4' has no chips"),
        ("h100", "there is no topology 'h100'"),
        ("H100:2x4", "GPUs have a number, not sides as in 'H100:2x4'; write h100:8"),
    ],
)
@pytest.mark.parametrize("words", ["plan quickstart --topology {}", "plan --compare quickstart@{}"])
def test_what_nobody_rents_is_told_in_one_line_and_at_once(name, told, words, capsys, monkeypatch):
    monkeypatch.setattr("mc_jax.planning.topology.topologies.get_topology_desc", None)
    begun = time.process_time()
    assert main(words.format(name).split()) == 2
    assert time.process_time() - begun < 1, "names are read before anything large is imported or compiled"
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_every_chip_that_can_be_rented_has_figures():
    assert list(TPU_FAMILIES) == list(CHIPS)
    assert list(GPU_NAMES) == list(GPUS)


def test_a_count_stands_for_the_slice_most_like_a_cube():
    assert read_topology("v5p-1024").sides == (8, 8, 8), "not 4x8x16, which has as many chips"

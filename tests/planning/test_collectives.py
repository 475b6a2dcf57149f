"""What is sent is told by kind, bytes, axis and time, in all the ways that the compiler writes groups."""

import types

import numpy as np
import pytest

from mc_jax.planning.chips import CHIPS
from mc_jax.planning.collectives import collectives, read_collective
from mc_jax.planning.program import Operation
from mc_jax.planning.topology import read_topology

V5P = CHIPS["v5p"]


def mesh_of(replica: int, fsdp: int, tensor: int, sides: tuple[int, ...], slices: int = 1):
    """A stand-in of a mesh whose devices lie in order in a torus, slice by slice."""
    devices = [
        types.SimpleNamespace(coords=at, slice_index=one)
        for one in range(slices)
        for at in np.ndindex(*sides)
    ]
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return types.SimpleNamespace(
        devices=grid.reshape(replica, fsdp, tensor), axis_names=("replica", "fsdp", "tensor")
    )


# As the compiler writes what a chip hands over to the runtime that joins slices.
SENT_BY_THE_HOST = (
    "is_host_transfer=true, frontend_attributes={"
    '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
)
TORUS = read_topology("v5p:4x4x4")
MESH = mesh_of(1, 16, 4, (4, 4, 4))


def read(text: str, mesh=MESH, topology=TORUS):
    return read_collective(sends(f"  %one = {text}, channel_id=1, metadata={{}}"), mesh, V5P, topology)


def sends(line: str, times: int = 1) -> Operation:
    return Operation(
        name="x", kind="", shape="", source="", times=times, cycles=0, is_kernel=False, collective=line
    )


@pytest.mark.parametrize(
    ("groups", "axes", "chips"),
    [
        ("mesh['replica'=1,'fsdp'=16,'tensor'=4] {'fsdp'}", ("fsdp",), 16),
        ("mesh['replica'=1,'fsdp'=16,'tensor'=4] {'fsdp','tensor'}", ("fsdp", "tensor"), 64),
        ("[16,4]<=[64]", ("tensor",), 4),
        ("[4,16]<=[16,4]T(1,0)", ("fsdp",), 16),
        ("{{0,4,8,12},{1,5,9,13}}", ("fsdp",), 4),
        ("{}", ("fsdp", "tensor"), 64),
    ],
)
def test_groups_are_axes_of_the_mesh(groups, axes, chips):
    one = read(f"bf16[64,512]{{1,0:T(8,128)(2,1)}} all-gather(%x), replica_groups={groups}, dimensions={{0}}")
    assert (one.kind, one.axes, one.chips, one.bytes) == ("all-gather", axes, chips, 64 * 512 * 2)


def test_gathering_takes_what_a_chip_lacks_over_all_its_links_along_the_axis():
    one = read("f32[1000,1000]{1,0} all-gather(%x), replica_groups=[16,4]<=[64]")
    # 3/4 of 4 MB come over two links: the side of 4 is a ring.
    assert one.seconds == pytest.approx(0.75 * 4e6 / (2 * V5P.link))
    plane = read("f32[1000,1000]{1,0} all-reduce(%x), replica_groups=[4,16]<=[16,4]T(1,0)")
    assert plane.seconds == pytest.approx(2 * 15 / 16 * 4e6 / (4 * V5P.link)), "two sides have four links"


def test_a_side_that_is_no_ring_has_one_link():
    one = read(
        "f32[1000]{0} all-gather(%x), replica_groups=[2,2]<=[4]",
        mesh_of(1, 2, 2, (2, 2, 1)),
        read_topology("v5p:2x2x1"),
    )
    assert one.seconds == pytest.approx(0.5 * 4000 / V5P.link)


def test_a_scattered_sum_counts_what_is_summed():
    one = read("f32[4,512]{1,0} reduce-scatter(%x), replica_groups=[16,4]<=[64], dimensions={0}")
    assert (one.kind, one.bytes) == ("reduce-scatter", 4 * 4 * 512 * 4)


def test_several_arrays_are_reduced_together():
    one = read(
        "(f32[256]{0:T(256)}, bf16[8]{0}, f32[]{:T(128)}) all-reduce(%x, %y, %z), replica_groups=[16,4]<=[64]"
    )
    assert one.bytes == 256 * 4 + 8 * 2 + 4


def test_what_starts_counts_its_result():
    one = read(
        "(bf16[128,8]{0,1:T(8,128)(2,1)S(1)}, bf16[128,8]{0,1}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    )
    assert (one.kind, one.axes, one.bytes) == ("collective-permute", ("tensor",), 2048)


def test_between_slices_the_network_is_what_it_takes():
    mesh = mesh_of(2, 4, 1, (2, 2, 1), slices=2)
    one = read(
        f"(f32[1000]{{0}}, u32[]{{:S(2)}}, token[]) send(%x, %after-all), {SENT_BY_THE_HOST}",
        mesh,
        read_topology("v5p:2x2x1", 2),
    )
    assert (one.kind, one.axes, one.chips, one.bytes) == ("all-reduce", ("replica",), 2, 4000)
    assert one.network
    assert one.seconds == pytest.approx(2 * 0.5 * 4000 / V5P.network)


def test_equal_ones_are_counted_together():
    one = sends("%x = f32[8]{0} all-gather(%y), replica_groups=[16,4]<=[64]", times=18)
    (found,) = collectives([one, one], MESH, V5P, TORUS)
    assert found.times == 36

"""The compiler is asked for what it would not do unasked, where the chip can do it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tpu_topology import CHIPS, four

from mc_jax.parallel.compiler import compiler_options
from mc_jax.planning import _sendings, program
from mc_jax.planning.program import operations


def lowered_for(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Eight layers of two maps, whose weights are divided among the devices."""
    mesh = jax.sharding.Mesh(np.array(devices), "fsdp")
    whole = jax.NamedSharding(mesh, jax.P())

    def layer(x, weights):
        for weight in weights:
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole))
        return x, None

    def divided(*shape, axis):
        spec = jax.P(*[None] * axis, "fsdp")
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    x = divided(8 * len(devices), 1024, 2048, axis=0)
    weights = [divided(8, 2048, 2048, axis=1)] * 2
    with jax.set_mesh(mesh):
        layers = jax.jit(
            lambda x, weights: jax.lax.scan(layer, x, weights)[0], compiler_options=compiler_options()
        )
        return layers.lower(x, weights)


def gathers(programs, devices: Sequence[jax.Device]) -> list[list]:
    """What a layer sends, and whether the chip computes meanwhile."""
    lowered = lowered_for(devices)

    def sent():
        found = operations(lowered.compile().as_text())
        return [[str(one.collective), one.overlaps] for one in found if one.collective and one.times == 8]

    return programs.compiled(lowered, sent, [program, _sendings])


def test_no_option_is_for_what_is_no_tpu():
    assert compiler_options() == {}


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_gathered_while_a_chip_computes_if_it_can(programs, chip):
    found = gathers(programs, four(chip))
    assert found
    if chip in ("v5p", "v6e", "tpu7x"):
        assert all(overlaps for _, overlaps in found), (
            "libtpu's options for SparseCores have another effect now"
        )


def test_on_many_chips_weights_are_gathered_and_not_summed(programs):
    four("v5e")
    found = gathers(programs, topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices)
    assert found
    for line, _ in found:
        assert " all-gather(" in line, "libtpu gathers by summing zeros: twice the bytes"

"""The compiler is asked for what it would not do unasked, where the chip can do it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tpu_topology import CHIPS, four

from mc_jax.parallel.compiler import compiler_options
from mc_jax.planning.program import Operation, operations


def gathers(devices: Sequence[jax.Device]) -> list[Operation]:
    """What eight layers of two maps send, whose weights are divided among the devices."""
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
        text = layers.lower(x, weights).compile().as_text()
    return [one for one in operations(text) if one.collective and one.times == 8]


def test_no_option_is_for_what_is_no_tpu():
    assert compiler_options() == {}


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_gathered_while_a_chip_computes_if_it_can(chip):
    found = gathers(four(chip))
    assert found
    if chip in ("v5p", "v6e", "tpu7x"):
        assert all(one.overlaps for one in found), "libtpu's options for SparseCores have another effect now"


def test_on_many_chips_weights_are_gathered_and_not_summed():
    four("v5e")
    found = gathers(topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices)
    assert found
    for one in found:
        assert " all-gather(" in str(one.collective), "libtpu gathers by summing zeros: twice the bytes"

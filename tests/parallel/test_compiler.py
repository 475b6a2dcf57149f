"""The compiler is asked for what it would not do unasked, where the chip can do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_topology import CHIPS, four

from mc_jax.parallel.compiler import compiler_options
from mc_jax.planning.program import operations


def test_no_option_is_for_what_is_no_tpu():
    assert compiler_options() == {}


@pytest.mark.parametrize("chip", CHIPS)
def test_weights_are_gathered_while_a_chip_computes(chip):
    """Layers of two maps: the second's weights come while the first's are used."""
    mesh = jax.sharding.Mesh(np.array(four(chip)), "fsdp")
    whole = jax.NamedSharding(mesh, jax.P())

    def layer(x, weights):
        for weight in weights:
            x = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole))
        return x, None

    with jax.set_mesh(mesh):
        options = compiler_options()
        layers = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)[0], compiler_options=options)
        weights = [
            jax.ShapeDtypeStruct(
                (8, 2048, 2048), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp"))
            )
        ] * 2
        x = jax.ShapeDtypeStruct(
            (32, 1024, 2048), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp"))
        )
        text = layers.lower(x, weights).compile().as_text()
    gathers = [one for one in operations(text) if one.collective and one.times == 8]
    assert gathers
    assert bool(options) == (chip in ("v5p", "v6e", "tpu7x"))
    if options:
        assert all(one.overlaps for one in gathers), (
            "libtpu's options for SparseCores have another effect now"
        )

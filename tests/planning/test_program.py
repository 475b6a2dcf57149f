"""The operations of a program, with the turns of the loops around them."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from tpu_topology import compile_for

from mc_jax.planning.program import operations


def _layers(x, weights):
    def layer(x, weight):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: jnp.tanh(x @ weight), jnp.sin, x), None

    return jax.lax.scan(layer, x, weights)[0]


def test_what_is_in_a_loop_runs_as_often_as_the_loop():
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((24, 512, 512), jnp.bfloat16)
    found = list(operations(compile_for("v5e", _layers, x, weights).as_text()))
    product = next(operation for operation in found if "dot_general" in operation.source)
    assert product.times == 24
    assert not product.is_kernel
    # 512^3 multiplications on four units of 128 x 128; the weights come from HBM, which takes longer.
    assert 1 <= product.cycles / (512**3 / (4 * 128 * 128)) < 8
    assert any("sin" in operation.source for operation in found), "both branches of a conditional count"


def test_kernels_are_told_from_xlas_operations():
    def kernel(x_ref, y_ref):
        y_ref[...] = 2.0 * x_ref[...]

    def double(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x)

    def scan(x):
        return jax.lax.scan(lambda x, _: (double(x), None), x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    found = [one for one in operations(compile_for("v5e", scan, x).as_text()) if one.is_kernel]
    assert [(one.name.partition(".")[0], one.times, one.cycles) for one in found] == [("double", 7, 0)]

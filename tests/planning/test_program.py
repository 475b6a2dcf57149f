"""The operations of a program, with the turns of the loops around them."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from tpu_topology import lower_for

from mc_jax.planning.program import operations
from pallas_kernels._expected import SELDOM


def _layers(x, weights):
    def layer(x, weight):
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: jnp.tanh(x @ weight), jnp.sin, x), None

    return jax.lax.scan(layer, x, weights)[0]


def test_what_is_in_a_loop_runs_as_often_as_the_loop():
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((24, 512, 512), jnp.bfloat16)
    found = list(operations(lower_for("v5e", _layers, x, weights).compile().as_text()))
    product = next(operation for operation in found if "dot_general" in operation.source)
    assert product.times == 24
    assert not product.is_kernel
    # 512^3 multiplications on four units of 128 x 128; the weights come from HBM, which takes longer.
    assert 1 <= product.cycles / (512**3 / (4 * 128 * 128)) < 8
    assert any("sin" in operation.source for operation in found), "both branches of a conditional count"


def test_a_branch_that_is_said_to_run_seldom_does_not_count():
    def run(x):
        def seldom(x):
            with jax.named_scope(SELDOM):
                return jnp.cosh(x @ x)

        return jax.lax.cond(jnp.sum(x) > 0, jnp.sin, seldom, x)

    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    found = list(operations(lower_for("v5e", run, x).compile().as_text()))
    assert any("sin" in operation.source for operation in found)
    assert not any(operation.products for operation in found)


# As the compiler writes a loop whose first turn it has put before it.
_PEELED = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%counter, %one)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %turn = f32[8]{0} sine(%x)
  ROOT %both = (s32[]{:T(128)}, /*index=1*/f32[8]{0}) tuple(%next, %turn)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %copy = s32[]{:T(128)} copy(%start)
  %tuple = (s32[]{:T(128)}, f32[8]{0}) tuple(%copy, /*index=1*/%x)
  %while = (s32[]{:T(128)}, f32[8]{0}) while(%tuple), condition=%cond, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%while), index=1
}
"""


@pytest.mark.parametrize(("start", "turns"), [(0, 4), (1, 3)])
def test_a_loop_turns_from_where_it_begins(start, turns):
    found = operations(_PEELED.replace("START", str(start)))
    assert [one.times for one in found if one.name == "turn"] == [turns]


def test_kernels_are_told_from_xlas_operations():
    def kernel(x_ref, y_ref):
        y_ref[...] = 2.0 * x_ref[...]

    def double(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x)

    def scan(x):
        return jax.lax.scan(lambda x, _: (double(x), None), x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    found = [one for one in operations(lower_for("v5e", scan, x).compile().as_text()) if one.is_kernel]
    assert [(one.name.partition(".")[0], one.times, one.cycles) for one in found] == [("double", 7, 0)]

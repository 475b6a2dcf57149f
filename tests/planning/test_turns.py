"""What a kernel decides while it runs is counted by its bounds and conditions, place by place of the grid."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mc_jax.planning.turns import counts_of, kernel_works
from pallas_kernels._expected import loop, when_seldom


def _kernel(x_ref, y_ref):
    block = pl.program_id(1)
    y_ref[...] = jnp.zeros_like(y_ref)

    def visit(_, carry):
        y_ref[...] += jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)
        return carry

    jax.lax.fori_loop(0, (block + 1) // 2, visit, None)

    @pl.when(block == 3)
    def _():
        jax.lax.fori_loop(block, 2 * block, visit, None)

    jax.lax.fori_loop(0, 5, visit, None)


@pytest.fixture(scope="module")
def works():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def once(x):
        block = pl.BlockSpec((8, 8), lambda i, j: (0, 0))
        call = pl.pallas_call(
            _kernel, grid=(2, 4), out_shape=x, in_specs=[block], out_specs=block, name="visits"
        )
        return call(x)

    def layers(x):
        return jax.lax.scan(lambda x, _: (once(x), None), x, length=7)[0]

    return list(kernel_works(jax.jit(layers).trace(x).jaxpr.jaxpr))


def test_turns_are_means_over_the_grid(works):
    (work,) = works
    # 0, 1, 1, 2 turns at the four blocks; then 3 at the last alone; a loop of five turns the compiler knows.
    assert work.turns == (1.0, 0.75)
    assert list(itertools.islice(counts_of(works)("visits").each_turns(), 3)) == [1.0, 0.75, 1.0]


def test_branches_with_products_run_at_a_share_of_the_places():
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.zeros_like(y_ref)

        @pl.when(pl.program_id(0) >= 1)
        def _():
            y_ref[...] += jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(0) == 0)  # without a product
        def _():
            y_ref[...] += 1.0

    (work,) = _works(kernel, (4,), lambda i: (0, 0), lambda i: (i, 0))
    assert work.shares == (0.75,)
    assert work.products == 3 * 2 * 8**3


def test_blocks_that_stay_are_not_moved_again():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    # x comes for i = 0 and 1, and stays for all j; y is another block at each place.
    (work,) = _works(kernel, (2, 3), lambda i, j: (i, 0), lambda i, j: (3 * i + j, 0))
    block = 8 * 8 * 4
    assert work.places == 6
    assert work.blocks == 12 * block
    assert work.moved == (2 + 6) * block


def _works(kernel, grid, index_x, index_y):
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((64, 8), jnp.float32),
        in_specs=[pl.BlockSpec((8, 8), index_x)],
        out_specs=pl.BlockSpec((8, 8), index_y),
        name="visits",
    )
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    return list(kernel_works(jax.jit(call).trace(x).jaxpr.jaxpr))


def test_products_count_the_turns_and_calls_the_layers(works):
    (work,) = works
    assert work.times == 7
    assert work.products == 2 * 8**3 * 2 * (0 + 1 + 1 + 2 + 3 + 4 * 5)


def test_copies_that_a_kernel_says_to_be_seldom_are_not_counted():
    def kernel(ends, x_any, y_ref):
        @when_seldom(pl.program_id(0) == ends[0])
        def _():
            pltpu.sync_copy(x_any.at[0], y_ref)

        @pl.when(pl.program_id(0) != ends[0])
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

    x = jax.ShapeDtypeStruct((3, 8, 128), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((8, 128), lambda i, ends: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        name="ends",
    )
    traced = jax.jit(lambda ends, x: call(ends, x)).trace(jax.ShapeDtypeStruct((1,), jnp.int32), x)
    (work,) = kernel_works(traced.jaxpr.jaxpr)
    assert work.seldom == 4 * 8 * 128 * 4, "at each of four places, of the smaller of the copy's two ends"
    assert work.moved == 8 * 128 * 4, "the result alone"


def test_loops_that_depend_on_data_turn_as_often_as_they_expect():
    def kernel(stops, y_ref):
        def add(_, carry):
            y_ref[...] += 1
            return carry

        def add_often(_, carry):
            return jax.lax.fori_loop(0, stops[1], add, carry)

        loop(stops[0], add_often, None, expected=2.5)
        jax.lax.fori_loop(0, stops[1], add, None)

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[],
            out_specs=pl.BlockSpec((8, 128), lambda i, _: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        name="stops",
    )
    traced = jax.jit(lambda stops: call(stops)).trace(jax.ShapeDtypeStruct((2,), jnp.int32))
    (work,) = kernel_works(traced.jaxpr.jaxpr)
    assert work.turns == (2.5, 1.0, 1.0), "a loop in one, and one that says nothing, turn once"

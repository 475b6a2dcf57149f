"""The functional core over rows that devices share is the core over whole rows, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caching_arguments import AGGREGATIONS, CHUNK, SEGMENT, arguments

from mc_jax import caching
from mc_jax.config import MeshConfig
from mc_jax.memories import Coefficients
from mc_jax.parallel import make_mesh, memory

LENGTH = 8 * SEGMENT
# Every kind of document: over several devices' borders, from a border on, inside of a run, of one chunk.
STARTS = [[20, 48, 52], [16, 32, 64]]


def compare(settings: caching.Settings, mlp: bool, *, router: str = "inputs", documents: bool = True):
    """Hold reads, gates and all gradients of a core on four devices a row to those on one."""
    found = arguments(settings.memory, mlp, settings.aggregation, length=LENGTH, router=router)
    if settings.segmentation == "logarithmic" and settings.segment_init == "independent":
        del found["initial_state"]
    ids = None
    if documents:
        ids = jnp.sum(jnp.arange(LENGTH)[None, :, None] >= jnp.array(STARTS)[:, None], axis=-1)
        ids = ids % 2  # any that change will do

    def core(found, run):
        routing = None
        if "u" in found:
            keys = found.get("router_keys", found["k"])
            routing = caching.Routing(found["u"], keys, found.get("online_logit"))
        coefficients = Coefficients(**{name: found.get(name) for name in Coefficients._fields})
        y, gates = run(
            *(found[name] for name in "qkv"),
            routing,
            coefficients,
            settings,
            document_ids=ids,
            initial_state=found.get("initial_state"),
        )[:2]
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, gates)

    def outputs(run):
        return jax.jit(jax.value_and_grad(functools.partial(core, run=run), has_aux=True))(found)

    expected = outputs(caching.forward)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=4))):
        got = outputs(memory.forward)
    for (path, left), right in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        right = np.broadcast_to(right, left.shape)  # gates that all heads share
        error = np.max(np.abs(left - right)) / max(np.max(np.abs(right)), 1e-3)
        assert error < 1e-9, f"{jax.tree_util.keystr(path)} is off by {error:.1e} where devices share rows"


def settings_of(memory: str, **changes) -> caching.Settings:
    return caching.Settings(
        **{"memory": memory, "aggregation": "gated", "segment_length": SEGMENT, "segmentation": "constant"}
        | {"segment_init": "checkpoint", "chunk_length": CHUNK}
        | changes
    )


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


# Each memory with another way to read: both cost seconds to compile.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "mlp", "changes", "router"),
    [
        slow("linear", False, {"aggregation": "gated"}, "inputs"),
        ("swla", False, {"aggregation": "sparse", "top_k": 1, "router_blocks": 2}, "inputs"),
        ("delta", False, {"aggregation": "null", "top_k": 2, "selected_read": "dense"}, "keys"),
        slow("titans", False, {"aggregation": "average", "top_k": 2}, "inputs"),
        slow("dla", True, {"aggregation": "residual", "segment_init": "independent"}, "inputs"),
        ("titans", True, {"aggregation": "soup"}, "inputs"),
        slow("linear", False, {"segmentation": "logarithmic"}, "inputs"),
        ("linear", False, {"segmentation": "logarithmic", "segment_init": "independent"}, "inputs"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_core_over_rows_that_devices_share_is_the_core_over_whole_rows(memory, mlp, changes, router):
    compare(settings_of(memory, **changes), mlp, router=router)


# The cases above have every memory, and every aggregation but "none", which is below. These have what they
# lack: a residual read and an MLP of dla that go on over devices, delta's gated read.
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("memory", "mlp", "aggregation"),
    [("swla", False, "residual"), ("delta", False, "gated"), ("dla", True, "sparse")],
)
def test_other_pairs_of_memory_and_aggregation_work_over_shared_rows(memory, mlp, aggregation):
    compare(settings_of(memory, aggregation=aggregation, **AGGREGATIONS[aggregation]), mlp)


@pytest.mark.usefixtures("x64")
def test_rows_of_one_document_need_no_ids():
    compare(settings_of("linear", aggregation="none"), False, documents=False)

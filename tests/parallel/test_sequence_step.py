"""A step of devices that share rows is the step on one device, and only states go between those devices."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded_step import MODELS, ONE, ROWS, VOCABULARY, config_of, losses, must_agree
from tpu_topology import four

from mc_jax.config import MeshConfig
from mc_jax.parallel import make_mesh
from mc_jax.planning.program import operations
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.run import abstract_state
from mc_jax.training.step import make_step

LENGTH = 64  # eight segments
MESHES = {
    "fsdp 2, sequence 4": MeshConfig(fsdp=2, sequence=4),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
}


# In float64 the core over shared rows agrees to 1e-9, for all memories and aggregations
# (`test_sequence_core`): the rest is the order of sums, and what is around the core.
@pytest.mark.parametrize(
    ("name", "mesh", "remat"),
    [
        ("attention", "fsdp 2, sequence 2, tensor 2", "none"),
        pytest.param("linear, gated", "fsdp 2, sequence 4", "blocks", marks=pytest.mark.slow),
        pytest.param("delta, sparse", "fsdp 2, sequence 2, tensor 2", "maps", marks=pytest.mark.slow),
        pytest.param("dla, soup", "fsdp 2, sequence 4", "states", marks=pytest.mark.slow),
    ],
)
def test_first_gradients_of_shared_rows_are_those_on_one_device(name, mesh, remat):
    must_agree(name, MESHES[mesh], length=LENGTH, most=2e-5, remat=remat)


@pytest.mark.slow
def test_twenty_losses_of_shared_rows_are_those_on_one_device():
    config = config_of(MODELS["linear, gated"], context_length=LENGTH, learning_rate=3e-4)
    found, expected = losses(config, MESHES["fsdp 2, sequence 4"], 20), losses(config, ONE, 20)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


_EXPECTED = ("all-gather", "reduce-scatter", "collective-permute")


def lowered_step(model: dict, mesh: jax.sharding.Mesh, length: int) -> tuple[jax.stages.Lowered, dict]:
    """The step, and the shapes of its parameters."""
    config = config_of(model, context_length=length)
    with jax.set_mesh(mesh):
        graph, state = abstract_state(config, VOCABULARY)
        step = make_step(graph, make_optimizer(config.training), accumulation=1)
        laid = jax.NamedSharding(mesh, jax.P("fsdp", "sequence"))
        dtypes = dict.fromkeys(("inputs", "targets", "document_ids"), jnp.int32) | {"loss_mask": jnp.float32}
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, length), dtype, sharding=laid) for name, dtype in dtypes.items()
        }
        return step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32)), state.parameters


def groups_of(line: str) -> list[list[int]]:
    """The devices that a collective in a program's text brings together."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", line):
        return [[int(x) for x in pair.split(",")] for pair in pairs[1].split("},{")]
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = re.findall(r"'(\w+)'", found[2])
        others = [name for name in sizes if name not in chosen]
        order = [list(sizes).index(name) for name in (*others, *chosen)]
        ids = np.arange(np.prod(list(sizes.values()))).reshape(*sizes.values()).transpose(order)
        return ids.reshape(-1, int(np.prod([sizes[name] for name in chosen]))).tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", line):
        sizes = [int(x) for x in found[3].split(",")]
        order = [int(x) for x in found[4].split(",")] if found[4] else range(len(sizes))
        return np.arange(np.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, int(found[2])).tolist()
    found = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    assert found, f"the groups of a collective are written in a new way: {line}"
    return [[int(x) for x in group.split(",")] for group in found[1].split("},{")]


def collectives(text: str, mesh: jax.sharding.Mesh) -> dict[tuple[str, tuple[str, ...]], list[int]]:
    """Of a program for a mesh: bytes of each result, by the collective's kind and the axes it goes over."""
    name = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
    lines = {named[1]: line for line in text.splitlines() if (named := name.match(line))}
    place = {device.id: index for index, device in np.ndenumerate(mesh.devices)}
    found = collections.defaultdict(list)
    for operation in operations(text):
        if not re.match("all-(gather|reduce|to-all)|reduce-scatter|collective", operation.kind):
            continue
        group = np.array([place[device] for device in groups_of(lines[operation.name])[0]])
        axes = tuple(np.array(mesh.axis_names)[(group != group[0]).any(axis=0)].tolist())
        for dims in re.findall(r"[fs]32\[([\d,]*)\]", operation.shape):
            size = 4 * int(np.prod([int(x) for x in dims.split(",") if x]))
            found[operation.kind, axes] += [size] * operation.times
    return found


@pytest.fixture(scope="module")
def linear_step() -> tuple[dict[tuple[str, tuple[str, ...]], list[int]], dict]:
    """What the step of a linear memory moves on fsdp 2, sequence 4; its parameters' shapes."""
    mesh = make_mesh(MESHES["fsdp 2, sequence 4"])
    lowered, parameters = lowered_step(MODELS["linear, gated"], mesh, LENGTH)
    return collectives(lowered.compile().as_text(), mesh), parameters


@pytest.mark.xdist_group("linear step")
def test_only_states_and_pooled_keys_go_between_devices_that_share_rows(linear_step):
    found, parameters = linear_step
    layers, devices, heads, dim, segments = 2, 4, 2, 8, 8
    rows, halo, features = ROWS // 2, 3, 16
    a_state, a_key = 4 * rows * heads * dim * dim, 4 * rows * heads * dim
    a_layer = [
        segments * a_state,  # the cached memories
        segments * a_key,  # their router keys
        devices * a_state,  # what runs that start from zero end with
        devices * 4 * rows * heads,  # and what retention leaves of their start
    ]
    # Once for all layers: a row's first and last document on each device, their number, each segment's.
    documents = [4 * rows * devices * 3, 4 * rows * segments]
    along = ("sequence",)
    assert sorted(found["all-gather", along]) == sorted(layers * a_layer + documents), "gathered"
    scattered = [size // devices for size in layers * a_layer]
    assert sorted(found["reduce-scatter", along]) == sorted(scattered), "their gradients"
    # Of queries, keys and values, and back; and once which documents they are of.
    tokens = 2 * 3 * layers * [4 * rows * halo * features] + [4 * rows * halo]
    # Once more by one, two and three tokens, to tell which of them a number that is not finite reaches.
    tokens += [4 * rows * distance for distance in range(1, halo + 1)]
    assert sorted(found["collective-permute", along]) == sorted(tokens), "the convolution's halo"
    leaves = jax.tree.leaves(parameters)
    gradients = sum(4 * leaf.size for leaf in leaves)
    rest = {key: sum(sizes) for key, sizes in found.items() if "sequence" in key[1] and key[1] != along}
    rest["all-reduce", along] = sum(found["all-reduce", along])
    assert {kind for kind, _ in rest} == {"all-reduce"}, "a collective over a row's devices that nobody needs"
    assert {kind for kind, axes in found if axes == along} <= {"all-reduce", *_EXPECTED}, "a new collective"
    # The embedding's gradient comes in two parts, as it is tied; a norm has a few scalars.
    embedding = 4 * parameters["embedding"].size
    assert sum(rest.values()) <= gradients + 2 * embedding + 200, (
        "more than gradients is summed over a row's devices"
    )


@pytest.mark.xdist_group("linear step")
def test_each_weight_is_gathered_twice_and_each_gradient_summed_once(linear_step):
    found, parameters = linear_step
    matrices = {
        jax.tree_util.keystr(path): 4 * leaf.size
        for path, leaf in jax.tree.leaves_with_path(parameters["blocks_0"])
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert not [kind for kind, axes in found if not axes], "a collective over axes of one device"
    gathered = sum(found["all-gather", ("fsdp",)])
    embedding = 4 * parameters["embedding"].size
    # Of a layer the maps are gathered forward and backward, and never kept between; the embedding is looked
    # up, and is the output map, which the loss gathers forward and backward.
    assert gathered == 2 * sum(matrices.values()) + 3 * embedding
    reduced = sum(
        sum(sizes) for (kind, axes), sizes in found.items() if kind != "all-gather" and "fsdp" in axes
    )
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(parameters))
    assert sum(matrices.values()) <= reduced <= gradients + 2 * embedding + 200, (
        "each gradient is summed once"
    )


@pytest.mark.usefixtures("quick_tpu_compiler")
@pytest.mark.parametrize("memory", ["linear", "delta"])
def test_a_step_for_four_tpus_that_share_rows_runs_the_kernels(programs, memory):
    model = {"memory": memory, "model_dim": 512, "num_heads": 4, "mlp_dim": 512, "num_layers": 1}
    model |= {"segment_length": 256, "chunk_length": 64, "aggregation": "gated"}
    lowered, _ = lowered_step(model, make_mesh(MeshConfig(sequence=2), four("v5e")), 1024)
    found = programs.compiled(lowered)["kernels"]
    for kernel in (f"{memory}_memory", f"{memory}_memory_backward", "state_read", "state_read_backward"):
        assert kernel in found, f"{kernel} is not in the program"

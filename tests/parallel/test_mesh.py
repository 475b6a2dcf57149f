"""The mesh takes up all devices evenly, or says in one line what to set."""

import dataclasses

import jax
import numpy as np
import pytest

from mc_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from mc_jax.parallel import local_rows, make_mesh, must_fit, on_mesh

MODEL = ModelConfig(model_dim=16, num_heads=2, mlp_dim=24)
CONFIG = Config(model=MODEL, data=DataConfig(context_length=32), training=TrainingConfig(batch_size=8))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(tensor=2), (1, 4, 1, 2)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(replica=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(sequence=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_what_is_left_open_takes_the_rest_of_the_devices(sizes, expected):
    assert tuple(make_mesh(sizes).shape.values()) == expected


def test_sizes_that_leave_devices_idle_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"is 6 devices and there are 8; set mesh.fsdp to -1"):
        make_mesh(MeshConfig(replica=1, fsdp=3, tensor=2))


@pytest.mark.parametrize(
    ("sizes", "change", "message"),
    [
        (MeshConfig(), {"training": TrainingConfig(batch_size=6)}, "set training.batch_size to 8"),
        (
            MeshConfig(),
            {"training": TrainingConfig(batch_size=8, accumulation=2)},
            "in 2 parts cannot be shared evenly .* set training.batch_size to 16",
        ),
        (
            MeshConfig(tensor=4),
            {},
            "mesh.tensor 4 does not divide model.num_heads 2; set mesh.tensor to 2 and mesh.fsdp to -1",
        ),
        (
            MeshConfig(),
            {"model": dataclasses.replace(MODEL, model_dim=12)},
            "mesh.fsdp 8 does not divide model.model_dim 12; set mesh.fsdp to 4",
        ),
        (
            MeshConfig(sequence=4),
            {"data": DataConfig(context_length=1536)},
            "context_length 1536 cannot be cut into mesh.sequence 4 equal runs of whole segments of "
            "model.segment_length 256; set data.context_length to 2048, or mesh.sequence to 2 and mesh.fsdp "
            "to -1",
        ),
        (
            MeshConfig(sequence=8),
            {"model": dataclasses.replace(MODEL, layer_pattern=("attention",))}
            | {"data": DataConfig(context_length=36)},
            "mesh.sequence 8 equal runs of tokens; set data.context_length to 40, or mesh.sequence to 4",
        ),
        (
            MeshConfig(sequence=2),
            {"model": dataclasses.replace(MODEL, segment_length=2, chunk_length=2)}
            | {"data": DataConfig(context_length=4)},
            "the 2 tokens of a device, .* are fewer than the 3 before a token that the convolution sees",
        ),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused_with_the_cure(sizes, change, message):
    with pytest.raises(ValueError, match=message):
        must_fit(make_mesh(sizes), dataclasses.replace(CONFIG, **change))


def test_what_the_error_advises_fits():
    must_fit(make_mesh(MeshConfig(tensor=2)), CONFIG)
    must_fit(
        make_mesh(MeshConfig(sequence=2)), dataclasses.replace(CONFIG, data=DataConfig(context_length=1536))
    )


def test_a_batch_lies_on_the_mesh_as_it_came():
    batch = {"inputs": np.arange(8 * 4, dtype=np.int32).reshape(8, 4)}
    with jax.set_mesh(make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))):
        assert local_rows(8) == list(range(8))
        inputs = on_mesh(batch, 8)["inputs"]
    np.testing.assert_array_equal(inputs, batch["inputs"])
    assert inputs.addressable_shards[0].data.shape == (2, 4)


def test_the_tokens_of_a_row_are_divided_in_order():
    batch = {"inputs": np.arange(8 * 4, dtype=np.int32).reshape(8, 4)}
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=4))):
        assert local_rows(8) == list(range(8))
        inputs = on_mesh(batch, 8)["inputs"]
    np.testing.assert_array_equal(inputs, batch["inputs"])
    for shard, (row, token) in zip(inputs.addressable_shards, np.ndindex(2, 4), strict=True):
        np.testing.assert_array_equal(shard.data, batch["inputs"][4 * row : 4 * row + 4, token : token + 1])

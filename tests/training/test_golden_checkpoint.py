"""A run that was trained on 28 November 2026 is read by the code of today.

`golden_run.tar.xz` holds the folder of a run of three steps on the embedded novels, without its metrics.
It is never made anew: where a format changes, another one is put beside it, and both are read.
"""

import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mc_jax.config import MeshConfig
from mc_jax.data.dataset import open_data
from mc_jax.parallel import make_mesh
from mc_jax.training.initial import Init, examine, initial_state
from mc_jax.training.run import load_run
from mc_jax.training.step import split_model

# Of its last token, after tokens 0, 7, 14, ...: the first six.
LOGITS = [-0.02703159, -0.09367125, 0.04198166, -0.06910388, -0.03227594, -0.00846107]
SHA256 = "29e39cd00fd24731bd666c00d617a106a9d6bc56039e50f301d3c96cfa6fe7c4"
GOLDEN = pathlib.Path(__file__).parent / "golden_run.tar.xz"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(folder, filter="data")
    return load_run(folder)


def test_a_golden_run_gives_the_logits_that_it_gave(run):
    tokens = (np.arange(32) * 7 % 256).astype(np.int32)[None]
    logits = jax.jit(lambda tokens: run.model(tokens))(jnp.asarray(tokens))
    np.testing.assert_allclose(logits[0, -1, :6], LOGITS, atol=1e-6)
    assert run.step == 3


def test_a_golden_run_can_be_begun_with(run):
    dataset = open_data(run.config.data)
    provenance = examine(Init(path=str(run.folder), state="full"), run.config, dataset)
    assert provenance.checkpoint_sha256 == SHA256
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        state = initial_state(provenance, run.config, dataset)
    jax.tree.map(np.testing.assert_array_equal, state.parameters, split_model(run.model)[1])

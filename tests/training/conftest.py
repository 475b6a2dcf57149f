"""The settings, corpus and folder of a small run that is never trained."""

import pytest
from etils import epath
from workplaces import WORDS

from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from mc_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(WORDS * 20)
    prepare([folder / "text.txt"], folder / "corpus", tokenizer="bytes")
    return folder / "corpus"


@pytest.fixture
def config(corpus):
    return Config(
        model=ModelConfig(
            num_layers=1, model_dim=16, num_heads=2, mlp_dim=32, segment_length=16, chunk_length=8
        ),
        data=DataConfig(corpus=str(corpus), tokenizer=None, context_length=64),
        training=TrainingConfig(steps=40, batch_size=4, warmup_steps=4),
        evaluation=EvaluationConfig(sample_tokens=8),
    )


@pytest.fixture
def run(tmp_path):
    return epath.Path(tmp_path / "runs" / "x")

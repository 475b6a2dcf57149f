"""Folders in which `mc-jax train tiny.py` trains a run of seconds."""

import dataclasses
import pathlib

from mc_jax import config as configs
from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig

WORDS = "the sea was calm and the wind came from the west; she walked along the shore. "
_NO_SAMPLE = EvaluationConfig(sample_tokens=0)
_RECIPE = '''
"""A run of seconds, for tests."""
from mc_jax import config as configs


def config() -> configs.Config:
    return configs.from_json({text!r})
'''


def tiny_run(
    *,
    evaluation: EvaluationConfig = _NO_SAMPLE,
    **training: int,
) -> Config:
    """Settings of a run whose steps take milliseconds, without its corpus.

    One size for all tests: a process finds the programs that another one compiled.
    """
    return Config(
        model=ModelConfig(
            num_layers=1, model_dim=16, num_heads=2, mlp_dim=32, segment_length=16, chunk_length=8
        ),
        data=DataConfig(corpus="", tokenizer=None, context_length=32),
        training=TrainingConfig(learning_rate=1e-2, batch_size=8, **training),
        evaluation=evaluation,
    )


def make_workplace(folder: pathlib.Path, config: Config, *, words: int = 150, held: int = 4) -> pathlib.Path:
    """Write a recipe and its corpus: as many sentences to train on and to be tested on."""
    from mc_jax.data.prepare import prepare

    (folder / "text.txt").write_text(WORDS * words)
    (folder / "held.txt").write_text(WORDS * held)
    prepare([folder / "text.txt"], folder / "corpus", held_out=[folder / "held.txt"], tokenizer="bytes")
    data = dataclasses.replace(config.data, corpus=str(folder / "corpus"))
    text = configs.to_json(dataclasses.replace(config, data=data))
    (folder / "tiny.py").write_text(_RECIPE.format(text=text))
    return folder

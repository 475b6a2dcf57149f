"""Runs with drawn weights and a text of some words, made without training."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mc_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
    validate,
)
from mc_jax.data.dataset import Dataset
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.prepare import prepare
from mc_jax.data.store import TokenStore, memory_store
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.nn import LanguageModel
from mc_jax.parallel import make_mesh
from mc_jax.training.checkpoint import Checkpoints
from mc_jax.training.run import Run, new_state
from mc_jax.training.run_folder import opened

TINY = {
    "num_layers": 1,
    "model_dim": 16,
    "num_heads": 2,
    "mlp_dim": 16,
    "segment_length": 8,
    "chunk_length": 4,
}
TEXTS = ("a short one", "", "a much longer one that needs several windows of context, step by step" * 2)


def store_of(texts=TEXTS) -> TokenStore:
    tokenizer = ByteTokenizer()
    documents = (Document(str(number), text) for number, text in enumerate(texts))
    return memory_store(tokenize(documents, tokenizer), tokenizer)


def config_of(context_length: int = 32, **model) -> Config:
    return validate(
        Config(
            model=ModelConfig(**TINY | model),
            data=DataConfig(context_length=context_length),
            evaluation=EvaluationConfig(batch_size=3),
        )
    )


def model_of(config: Config) -> LanguageModel:
    """Weights away from those with which training begins: a router that learned nothing reads all alike."""
    model = LanguageModel(config.model, ByteTokenizer().vocab_size, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), state)
    return nnx.merge(graph, noisy)


def run_of(texts=TEXTS, context_length: int = 32, **model) -> Run:
    config = config_of(context_length, **model)
    store = store_of(texts)
    dataset = Dataset(tokenizer=ByteTokenizer(), train=store, held_out=store)
    return Run(epath.Path("runs/untrained"), config, dataset, model_of(config), step=7)


WORDS = "the sea was calm and the wind came from the west; she walked along the shore. "


def kept_run(folder, name: str = "run", **model) -> epath.Path:
    """The folder of a run with two checkpoints, 1 and 2, as a training leaves it, and text.txt beside it."""
    (folder / "text.txt").write_text(WORDS * 8)
    (folder / "held.txt").write_text(WORDS[::-1] * 2)
    if not (folder / "store").exists():
        prepare([folder / "text.txt"], folder / "store", held_out=[folder / "held.txt"], tokenizer="bytes")
    config = Config(
        model=ModelConfig(**TINY | model),
        data=DataConfig(corpus=str(folder / "store"), tokenizer=None, context_length=32),
        training=TrainingConfig(steps=2, batch_size=2, warmup_steps=1),
        evaluation=EvaluationConfig(batch_size=4),
    )
    run = epath.Path(folder / name)
    with (
        opened(run, config, overwrite=False) as open_run,
        jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])),
        Checkpoints(run, seal=open_run.seal) as checkpoints,
    ):
        open_run.begin(0)
        _, state = new_state(config, open_run.dataset.tokenizer.vocab_size)
        assert checkpoints.restore(state) is None
        for step in (1, 2):
            checkpoints.save(step, state, {"loss": jnp.float32(5.0)}, force=True)
            checkpoints.confirm(step)
    return run

"""Runs with drawn weights and a text of some words, made without training."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, validate
from mc_jax.data.dataset import Dataset
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import TokenStore, memory_store
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.nn import LanguageModel
from mc_jax.training.run import Run

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

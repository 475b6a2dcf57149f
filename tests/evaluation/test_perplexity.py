import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_jax.config import ModelConfig
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import memory_store
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.data.windows import evaluation_windows
from mc_jax.evaluation.perplexity import evaluate
from mc_jax.nn import LanguageModel
from mc_jax.training.held_out import HeldOut
from mc_jax.training.step import split_model, token_losses


@pytest.fixture(scope="module")
def store():
    texts = ["a short one", "", "a much longer one that needs several windows of context, step by step" * 2]
    tokenizer = ByteTokenizer()
    return memory_store(
        tokenize((Document(str(i), text) for i, text in enumerate(texts)), tokenizer), tokenizer
    )


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        num_layers=1, model_dim=16, num_heads=2, mlp_dim=16, segment_length=8, chunk_length=4
    )
    return LanguageModel(config, ByteTokenizer().vocab_size, rngs=nnx.Rngs(params=0))


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess(store, model):
    graph, parameters = nnx.split(model)
    flat = nnx.merge(graph, jax.tree.map(jnp.zeros_like, parameters))
    result = evaluate(flat, store, context_length=32, stride=16, batch_size=3)
    vocabulary = ByteTokenizer().vocab_size
    assert result["tokens"] == store.num_pairs
    assert result["documents"] == len(store)
    np.testing.assert_allclose(result["loss"], math.log(vocabulary), rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], vocabulary, rtol=1e-4)
    expected = store.num_pairs * math.log2(vocabulary) / store.num_bytes
    np.testing.assert_allclose(result["bits_per_byte"], expected, rtol=1e-5)


def test_a_loss_that_is_no_number_is_an_error_and_a_huge_one_has_an_infinite_perplexity(
    store, model, monkeypatch
):
    windows = {"context_length": 32, "stride": 16, "batch_size": 3}
    monkeypatch.setattr(HeldOut, "loss", lambda *_: math.nan)
    with pytest.raises(ValueError, match="loss on the held-out text is nan, though all weights are finite"):
        evaluate(model, store, **windows)
    monkeypatch.setattr(HeldOut, "loss", lambda *_: 1000.0)
    assert evaluate(model, store, **windows)["perplexity"] == math.inf


def test_windows_longer_than_the_documents_give_the_plain_loss_of_each(store, model):
    result = evaluate(model, store, context_length=160, stride=80, batch_size=2)
    total = 0.0
    forward = jax.jit(model)
    for index in range(len(store)):
        ids = store.sequence(index, 0, len(store.document(index)) + 2)
        logits = np.asarray(jax.nn.log_softmax(forward(ids[None, :-1])[0]))
        total -= logits[np.arange(len(ids) - 1), ids[1:]].sum()
    np.testing.assert_allclose(result["loss"], total / store.num_pairs, rtol=1e-5)


def test_the_number_of_windows_in_a_batch_changes_nothing(store, model):
    one = evaluate(model, store, context_length=32, stride=8, batch_size=1)
    five = evaluate(model, store, context_length=32, stride=8, batch_size=5)
    np.testing.assert_allclose(one["loss"], five["loss"], rtol=1e-6)


def test_a_part_of_the_text_is_every_nth_window_of_it(store, model):
    graph, parameters = split_model(model)
    windows = {"context_length": 32, "stride": 8, "batch_size": 4}
    batches = list(evaluation_windows(store, **windows | {"batch_size": 1}))
    losses = jax.jit(lambda batch: token_losses(model, batch))
    chosen = batches[::3]
    expected = sum(float(losses(batch).sum()) for batch in chosen) / sum(
        float(batch["loss_mask"].sum()) for batch in chosen
    )
    part = HeldOut(graph, store, tokens=store.num_pairs // 3 + 1, **windows)
    np.testing.assert_allclose(part.loss(parameters), expected, rtol=1e-6)
    whole = HeldOut(graph, store, tokens=store.num_pairs, **windows)
    assert whole.loss(parameters) == HeldOut(graph, store, **windows).loss(parameters)

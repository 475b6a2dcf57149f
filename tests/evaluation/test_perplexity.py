import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from untrained import config_of, model_of, run_of, store_of

from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.data.windows import evaluation_windows
from mc_jax.evaluation.modes import Windows
from mc_jax.evaluation.perplexity import evaluate_held_out
from mc_jax.training.held_out import HeldOut
from mc_jax.training.run import Run
from mc_jax.training.step import split_model, token_losses


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess():
    run = run_of()
    graph, parameters = nnx.split(run.model)
    flat = nnx.merge(graph, jax.tree.map(jnp.zeros_like, parameters))
    result = evaluate_held_out(Run(run.folder, run.config, run.dataset, flat, run.step))
    store, vocabulary = run.dataset.held_out, ByteTokenizer().vocab_size
    assert store is not None
    assert result["tokens"] == store.num_pairs
    assert result["documents"] == len(store)
    assert result["bytes"] == store.num_bytes
    np.testing.assert_allclose(result["loss"], math.log(vocabulary), rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], vocabulary, rtol=1e-4)
    expected = store.num_pairs * math.log2(vocabulary) / store.num_bytes
    np.testing.assert_allclose(result["bits_per_byte"], expected, rtol=1e-5)
    assert result["loss_standard_error"] < 1e-6, "all tokens cost the same"


def test_a_loss_that_is_no_number_is_an_error_and_a_huge_one_has_an_infinite_perplexity(monkeypatch):
    read = Windows.read

    def all_cost(nats: float):
        def cost(*arguments):
            return (one._replace(nats=np.full_like(one.nats, nats)) for one in read(*arguments))

        monkeypatch.setattr(Windows, "read", cost)

    all_cost(math.nan)
    with pytest.raises(ValueError, match="loss on the text is nan, though all weights are finite"):
        evaluate_held_out(run_of())
    all_cost(1000.0)
    assert evaluate_held_out(run_of())["perplexity"] == math.inf


def test_the_held_out_result_while_training_is_that_at_its_end():
    run = run_of()
    graph, parameters = split_model(run.model)
    assert run.dataset.held_out is not None
    held_out = HeldOut(graph, run.dataset.held_out, context_length=32, stride=16, batch_size=2)
    result = evaluate_held_out(run)
    np.testing.assert_allclose(held_out.loss(parameters), result["loss"], rtol=1e-6)
    np.testing.assert_allclose(held_out.bits_per_byte(result["loss"]), result["bits_per_byte"], rtol=1e-6)


def test_a_part_of_the_text_is_every_nth_window_of_it():
    model, store = model_of(config_of()), store_of()
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

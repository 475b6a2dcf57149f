"""Judging samples: as a plain computation of one sample at a time does, whatever else is in the batch."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mc_jax.config import ModelConfig
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.evaluation.tasks import TASKS, RowSample, TextSample, TextTask, scoring
from mc_jax.evaluation.tasks.metrics import METRICS, Generated
from mc_jax.evaluation.tasks.sample import answer_tokens, prompt_tokens
from mc_jax.evaluation.tasks.scoring import Judge, generations, likelihoods, recalls
from mc_jax.nn import LanguageModel

TOKENIZER = ByteTokenizer()
TASK = TextTask(name="a", summary="b", draw=TASKS["passkey"].draw, metric="contains-any", new_tokens=12)


@functools.cache
def model(**changes) -> LanguageModel:
    settings = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "mlp_dim": 16}
    settings |= {"segment_length": 8, "chunk_length": 4, "segment_init": "independent"}
    return LanguageModel(ModelConfig(**{**settings, **changes}), 257, rngs=nnx.Rngs(params=1))


def sample(prompt: str, answers: tuple[str, ...], alternatives: tuple[str, ...] = ()) -> TextSample:
    return TextSample(
        prompt=prompt,
        tokens=prompt_tokens(TOKENIZER, prompt),
        answers=answers,
        alternatives=alternatives,
        depth=0.0,
        sources={},
    )


# Each prompt with each of its answers has 48 tokens, so that the plain computation compiles once.
SAMPLES = [
    sample("the sea was calm and", ("x" * 26,), ("y" * 26, "the wind came from a west.")),
    sample("x", ("the wind came from the west, as it is told me",)),
    sample("she walked along the shore of the sea, with", ("wnd",), ("far", "sea")),
]


def plain_log_likelihood(forward, prompt: np.ndarray, answer: np.ndarray) -> tuple[float, bool]:
    """The log-likelihood of one answer to one prompt, and whether it is greedy, by the forward pass."""
    ids = np.concatenate([prompt, answer])
    assert len(ids) == 48
    logits = np.asarray(forward(ids[None])[0])[len(prompt) - 1 : -1]
    scored = np.asarray(jax.nn.log_softmax(logits))
    return float(scored[np.arange(len(answer)), answer].sum()), bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize(
    "changes",
    [{}, {"aggregation": "sparse", "top_k": 1, "layer_pattern": ("memory", "attention"), "num_layers": 2}],
)
def test_log_likelihoods_are_those_of_each_sample_alone(changes):
    judge = Judge(model=model(**changes), tokenizer=TOKENIZER, batch_size=2)
    forward = jax.jit(lambda tokens: judge.model(tokens))
    for one, likely in zip(SAMPLES, likelihoods(judge, SAMPLES, 64), strict=True):
        expected = [
            plain_log_likelihood(forward, one.tokens, answer_tokens(TOKENIZER, text))
            for text in (one.answers[0], *one.alternatives)
        ]
        np.testing.assert_allclose(likely.log_likelihood, expected[0][0], rtol=1e-5, atol=1e-5)
        assert likely.is_greedy == expected[0][1]
        assert likely.rank == 1 + sum(value >= expected[0][0] for value, _ in expected[1:])


def test_prompts_and_batches_are_filled_up_to_one_program_which_changes_nothing():
    judge = Judge(model=model(), tokenizer=TOKENIZER, batch_size=2)
    together = likelihoods(judge, SAMPLES, 64)
    compiled = scoring._answers._cache_size()
    for length, chosen in ((64, SAMPLES[:1]), (61, [SAMPLES[0], SAMPLES[2], SAMPLES[0], SAMPLES[0]])):
        alone = likelihoods(judge, [*chosen, SAMPLES[1]], length)
        np.testing.assert_allclose(alone[0].log_likelihood, together[0].log_likelihood, rtol=1e-6)
    assert scoring._answers._cache_size() == compiled, "prompts and batches are not filled up to one shape"


def test_the_likeliest_token_is_greedy():
    judge = Judge(model=model(), tokenizer=TOKENIZER, batch_size=2)
    prompt = SAMPLES[0].tokens
    likeliest = int(np.argmax(jax.jit(lambda tokens: judge.model(tokens))(prompt[None])[0, -1]))
    graph, parameters = nnx.split(judge.model)
    rows = np.zeros((2, 64), np.int32)
    rows[:, : len(prompt)] = prompt
    # The shapes of the tests above, so that nothing is compiled.
    answers = np.full((3, 2, 48), likeliest, np.int32)
    _, greedy = scoring._answers(graph, parameters, rows, np.full(2, len(prompt), np.int32), answers)
    assert greedy[:, :, 0].all()


def test_each_sample_gets_what_was_generated_for_it(monkeypatch):
    """Batches are of one size and in order of length; what a model says is here the prompt again."""
    sizes = []

    def echo(model, prompts, *, tokens, temperature):
        assert (tokens, temperature) == (12, 0.0)
        sizes.append([len(prompt) for prompt in prompts])
        return np.stack([np.resize(prompt[1:], tokens) for prompt in prompts])

    monkeypatch.setattr(scoring, "generate", echo)
    said = generations(Judge(model=model(), tokenizer=TOKENIZER, batch_size=2), TASK, SAMPLES)
    assert sizes == [[2, 21], [44, 44]], sizes
    assert [one.text[:3] for one, _ in said] == ["the", "xxx", "she"]
    assert [score for _, score in said] == [0.0, 0.0, 0.0]


def test_rows_are_read_at_their_places_as_one_alone():
    rng = np.random.default_rng(0)
    rows = [
        RowSample(
            tokens=rng.integers(256, size=length).astype(np.int32),
            places=np.array(places, np.int32),
            targets=rng.integers(256, size=len(places)).astype(np.int32),
            candidates=np.arange(count, dtype=np.int32),
            sources={},
        )
        for length, places, count in ((20, [3, 9, 19], 256), (20, [12], 3), (20, [0, 1], 256))
    ]
    forward = jax.jit(lambda tokens: model()(tokens))
    found = recalls(Judge(model=model(), tokenizer=TOKENIZER, batch_size=2), rows, 21)
    for row, recall in zip(rows, found, strict=True):
        logits = np.asarray(forward(row.tokens[None])[0])[row.places]
        scored = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(row.places)), row.targets]
        np.testing.assert_allclose(recall.log_likelihood, scored.mean(), rtol=1e-5)
        assert recall.share == np.mean(logits.argmax(-1) == row.targets)
        among = row.candidates[logits[:, row.candidates].argmax(-1)]
        assert recall.ranked_share == np.mean(among == row.targets)


def test_weights_that_are_no_numbers_are_an_error_not_a_score():
    graph, parameters = nnx.split(model())
    broken = nnx.merge(graph, jax.tree.map(lambda x: x * np.float32(np.nan), parameters))
    with pytest.raises(ValueError, match="log-likelihood of sample 0 is not finite"):
        likelihoods(Judge(model=broken, tokenizer=TOKENIZER, batch_size=2), SAMPLES, 64)


@pytest.mark.parametrize(
    ("metric", "said", "answers", "score"),
    [
        ("contains-all", " It is PARIS, and\x01Rome.", ("paris", "rome"), 1.0),
        ("contains-all", "Paris", ("paris", "rome"), 0.5),
        ("contains-any", "so in rome", ("Paris", "Rome"), 1.0),
        ("contains-any", "in Oslo", ("Paris", "Rome"), 0.0),
        ("exact", " 12345", ("1234",), 1.0),
        ("exact", " 1235", ("1234",), 0.0),
        ("exact", "\n1234", ("1234",), 1.0),
        ("first-token", " x", ("y",), 1.0),
        ("first-token", "x", ("y",), 0.0),
        ("first-token", "", ("y",), 0.0),
    ],
)
def test_metrics_judge_as_they_are_defined(metric, said, answers, score):
    assert METRICS[metric](Generated(said, TOKENIZER.encode(said), TOKENIZER), answers) == score


def test_an_answer_ends_at_the_separator_and_at_a_newline_where_the_task_says_so():
    ids = np.array([*b"one\ntwo", TOKENIZER.separator_id, *b"three"], np.int32)
    assert scoring._until_stop(TOKENIZER, ids, stops_at_newline=False).text == "one\ntwo"
    stopped = scoring._until_stop(TOKENIZER, ids, stops_at_newline=True)
    assert stopped.text == "one"

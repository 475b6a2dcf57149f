"""The model that lm-eval asks: log-likelihoods, texts and what is cut, each against a plain loop."""

import functools
import logging

import jax
import numpy as np
import pytest
from untrained import config_of, model_of, run_of

from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.evaluation.dial import turn
from mc_jax.evaluation.tasks import scoring
from mc_jax.inference import generate as generation

pytest.importorskip("lm_eval", reason="lm-eval is not installed: scripts/setup eval")

from lm_eval.api.instance import Instance

from mc_jax.evaluation.harness.generation import Decoding, decoding_of, text_until
from mc_jax.evaluation.harness.model import HarnessModel

TOKENIZER = ByteTokenizer()
SEPARATOR = TOKENIZER.separator_id
LENGTH = 16  # tokens of the context; segments have 8
PAIRS = [
    ("the sea", " calm"),
    ("", "a"),
    ("one two", " three"),
    ("she walked along the shore of the sea, with the wind", " from the west"),  # longer than the context
    ("x", "y"),
]


def requests(kind: str, asked: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(asked)]


@functools.cache
def harness(batch_size: int = 2, **changes) -> HarnessModel:
    return HarnessModel(run_of(context_length=LENGTH, **changes), batch_size=batch_size)


@functools.cache
def forward(**changes):
    """Log-probabilities after each of a row's tokens, which are filled up for one compilation."""
    model = jax.jit(model_of(config_of(LENGTH, **changes)))

    def of(ids) -> np.ndarray:
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(jax.nn.log_softmax(model(row)[0]), np.float64)[: len(ids)]

    return of


def plain(context: str, continuation: str, **changes) -> tuple[float, bool]:
    """The log-likelihood of a continuation, read alone, and whether it is greedy."""
    ids = [SEPARATOR, *context.encode(), *continuation.encode()]
    count = len(continuation.encode())
    inputs = ids[-LENGTH - 1 : -1]
    scored = forward(**changes)(inputs)[-count:]
    targets = ids[-count:]
    return scored[np.arange(count), targets].sum(), bool((scored.argmax(-1) == targets).all())


@pytest.mark.parametrize(
    "changes",
    [{}, {"aggregation": "sparse", "top_k": 1, "layer_pattern": ("memory", "attention"), "num_layers": 2}],
    ids=["gated", "sparse-with-attention"],
)
def test_log_likelihoods_of_a_ragged_batch_are_those_of_each_alone(changes):
    found = harness(**changes).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        expected, is_greedy = plain(context, continuation, **changes)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        assert greedy == is_greedy


def test_a_greedy_continuation_is_called_greedy():
    context, said = "the sea", []
    for _ in range(3):
        said.append(int(forward()([SEPARATOR, *context.encode(), *said])[-1].argmax()))
    model, ids = harness(), [SEPARATOR, *context.encode()]
    right = model._loglikelihood_tokens([(("", ""), ids, said)], disable_tqdm=True)
    wrong = model._loglikelihood_tokens([(("", ""), ids, [*said[:2], said[2] ^ 1])], disable_tqdm=True)
    assert right[0][1]
    assert not wrong[0][1]


def test_lengths_are_rounded_up_to_few_compiled_shapes():
    model = harness()
    asked = [("a" * length, "b" * (1 + length % 5)) for length in range(1, 12)]
    before = scoring._at_places._cache_size()
    model.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    # Rows of one segment, and of the context.
    assert scoring._at_places._cache_size() - before <= 2, "round lengths up: filled_size"
    settings = {"until": ["\n"], "max_gen_toks": 4}
    before = generation._generate._cache_size()
    model.generate_until(
        requests("generate_until", [(context, settings) for context, _ in asked]), disable_tqdm=True
    )
    assert generation._generate._cache_size() - before <= 2, "round lengths up: filled_size"


def test_what_is_longer_than_the_context_is_cut_and_told(caplog):
    model = HarnessModel(run_of(context_length=LENGTH), batch_size=2)
    with caplog.at_level(logging.WARNING):
        model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert "1 of 5 contexts are cut from the left" in caplog.text
    assert model.get_model_info()["contexts_cut"] == {"loglikelihood": 1}
    with pytest.raises(ValueError, match="a continuation has 40 tokens"):
        model.loglikelihood(requests("loglikelihood", [("a", "b" * 40)]), disable_tqdm=True)


@pytest.mark.parametrize("stride", [None, 5])
def test_a_whole_text_is_read_in_windows_and_its_end_is_not_scored(stride):
    texts = ["a short one", "", "one that needs several windows of context", "x"]
    model = HarnessModel(run_of(context_length=LENGTH), batch_size=3, stride=stride)
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    found = model.loglikelihood_rolling(asked, disable_tqdm=True)
    step = stride or LENGTH
    for text, value in zip(texts, found, strict=True):
        ids = [SEPARATOR, *text.encode()]
        expected = 0.0
        for place in range(len(text)):  # targets, one by one
            end = LENGTH if place < LENGTH else LENGTH + step * (1 + (place - LENGTH) // step)
            end = min(end, len(text))
            start = max(0, end - LENGTH)
            expected += forward()(ids[start:end])[place - start, ids[place + 1]]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_a_text_begins_with_the_separator_and_a_continuation_does_not():
    model = harness()
    assert model.tok_encode("sea") == [SEPARATOR, *b"sea"]
    assert model.tok_encode("sea", add_special_tokens=False) == list(b"sea")
    assert model.tok_decode(model.tok_encode("sea")) == "sea"
    assert (model.eot_token_id, model.prefix_token_id, model.max_length) == (SEPARATOR, SEPARATOR, LENGTH)
    assert TOKENIZER.fingerprint in model.tokenizer_name


def test_no_token_reaches_over_the_boundary_to_a_continuation():
    bpe = train_bpe(["sea shore sea shore"] * 4, 262)
    assert len(bpe.encode("sea")) < 3
    model = harness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_tokenizer", bpe)
        context, continuation = model._encode_pair("the se", "a shore")
        assert bpe.decode(context) == "the se"
        assert bpe.decode(continuation) == "a shore"
        # lm-eval's own rule, where it scores what it should: white space counts to the continuation.
        context, continuation = model._encode_pair("the sea ", "shore")
        assert (bpe.decode(context), bpe.decode(continuation)) == ("the sea", " shore")


def test_texts_are_generated_alike_alone_and_in_a_batch():
    settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
    prompts = ["the sea", "x", "she walked along"]
    together = harness().generate_until(
        requests("generate_until", [(prompt, settings) for prompt in prompts]), disable_tqdm=True
    )
    for prompt, text in zip(prompts, together, strict=True):
        ids = [SEPARATOR, *prompt.encode()][-(LENGTH - 4) :]
        said: list[int] = []
        for _ in range(4):
            said.append(int(forward()([*ids, *said])[-1].argmax()))
        ends = said.index(SEPARATOR) if SEPARATOR in said else len(said)
        assert text == TOKENIZER.decode(said[:ends])


def test_drawn_texts_are_those_of_the_seed():
    settings = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("the sea", settings), ("x", settings)])
    drawn, again = (harness().generate_until(asked, disable_tqdm=True) for _ in range(2))
    assert drawn == again
    greedy = requests("generate_until", [(prompt, {"max_gen_toks": 4}) for prompt in ("the sea", "x")])
    assert drawn != harness().generate_until(greedy, disable_tqdm=True)


@pytest.mark.parametrize(
    ("said", "until", "tokens", "text"),
    [
        ("one\n\ntwo", ("\n\n",), 8, "one"),
        ("one\n\ntwo", ("two", "\n\n"), 8, "one"),  # the first in the text, not in the list
        ("one\n\ntwo", ("\n\n",), 4, "one"),  # half of the stop is within the tokens
        ("one\ntwo", ("\n\n",), 4, "one\n"),  # what began like a stop was none
        ("one two", (), 3, "one"),
        ("one two", ("two",), 3, "one"),
        ("stop", ("stop",), 4, ""),
    ],
)
def test_a_text_ends_before_the_first_stop_and_never_within_one(said, until, tokens, text):
    decoding = Decoding(tokens=tokens, until=until)
    ids = np.array([*said.encode()][: tokens + decoding.reserve], np.int32)
    assert text_until(TOKENIZER, ids, decoding) == text
    ended = np.array([*b"on", SEPARATOR, *said.encode()], np.int32)
    assert text_until(TOKENIZER, ended, decoding) == "on"


def test_settings_of_generation_are_taken_or_refused():
    assert decoding_of({"until": "\n"}, 7) == Decoding(tokens=7, until=("\n",))
    greedy = decoding_of({"do_sample": False, "temperature": 0.0, "max_new_tokens": 3, "num_beams": 1}, 7)
    assert greedy == Decoding(tokens=3)
    drawn = decoding_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": []}, 7)
    assert drawn == Decoding(tokens=7, temperature=0.7, top_p=0.9)
    with pytest.raises(ValueError, match="without repetition_penalty"):
        decoding_of({"repetition_penalty": 1.1}, 7)
    with pytest.raises(ValueError, match="without top_k"):
        decoding_of({"do_sample": True, "temperature": 0.7, "top_k": 40}, 7)
    with pytest.raises(ValueError, match="max_gen_toks 16 leaves no room"):
        harness().generate_until(requests("generate_until", [("a", {"max_gen_toks": 16})]), disable_tqdm=True)


def test_the_dial_is_turned_and_said():
    run = run_of(context_length=LENGTH)
    off = HarnessModel(turn(run, {"model.aggregation": "none"}), batch_size=2)
    asked = requests("loglikelihood", PAIRS)
    assert off.loglikelihood(asked, disable_tqdm=True) != harness().loglikelihood(asked, disable_tqdm=True)
    info = off.get_model_info()
    assert info["turned"]["model.aggregation"] == {"trained": "gated", "measured": "none"}
    assert info["hashes"]["tokenizer"] == TOKENIZER.fingerprint
    assert (info["context_length"], info["stride"]) == (LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("given", "others", "refusal"),
    [
        ({}, {}, "needs a run"),
        ({"run": "x", "top_p": 1}, {}, "no setting 'top_p'"),
        ({"run": "x", "batch_size": "many"}, {}, "batch_size is 'many'"),
        ({"run": "x"}, {"max_batch_size": 8}, "--max_batch_size has no effect"),
        ({"run": "nowhere"}, {"batch_size": "auto", "device": "cuda:0"}, "nowhere is no run folder"),
    ],
)
def test_mistakes_in_model_args_are_told(given, others, refusal):
    with pytest.raises(ValueError, match=refusal):
        HarnessModel.create_from_arg_obj(given, others)

"""Every mode against a loop over targets, one at a time, each read in the context that the mode names."""

import jax
import numpy as np
import pytest
from untrained import config_of, model_of, run_of, store_of

from mc_jax.caching import Storage
from mc_jax.config import MeshConfig
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.evaluation.core import add_up, measure
from mc_jax.evaluation.modes import ByPosition, LastK, Stream, Windows, mode_of
from mc_jax.evaluation.sums import COUNTED, difference
from mc_jax.parallel import make_mesh
from mc_jax.training.losses import BatchLosses

LENGTH = 24
MODES = (
    Windows(length=LENGTH, stride=10),
    LastK(length=LENGTH, k=5, first=40),
    ByPosition(length=LENGTH),
)


def mode_id(mode) -> str:
    return f"{mode.name} of {mode.length}"


@pytest.fixture(scope="module")
def store():
    return store_of()


@pytest.fixture(scope="module")
def nats_after(store):
    """Nats of a document's target at a place when only the inputs from `start` on were read, one by one."""
    forward = jax.jit(model_of(config_of()))
    memo = {}

    def of(document: int, start: int, place: int) -> float:
        ids = store.sequence(document, 0, len(store.document(document)) + 2)
        row = np.zeros((1, 160), np.int32)
        row[0, : place + 1 - start] = ids[start : place + 1]
        if (document, start) not in memo:
            longest = np.zeros((1, 160), np.int32)
            longest[0, : len(ids) - 1 - start] = ids[start:-1]
            memo[document, start] = np.asarray(jax.nn.log_softmax(forward(longest)[0]), np.float64)
        return -memo[document, start][place - start, ids[place + 1]]

    return of


def naive(mode, store, nats_after) -> dict[int, tuple[float, int]]:
    """Nats and tokens of each bucket of positions, by what the modes' docstrings say."""
    found: dict[int, list[float]] = {}
    for document in range(len(store)):
        pairs = len(store.document(document)) + 1
        for place in range(pairs):
            if mode.name == "last-k":
                if place < mode.first:
                    continue
                end = min(mode.first + (place - mode.first) // mode.k * mode.k + mode.k, pairs)
            elif place < min(mode.length, pairs):
                end = min(mode.length, pairs)
            else:
                step = mode.settings()["stride"]
                end = min(mode.length + ((place - mode.length) // step + 1) * step, pairs)
            start = max(end - mode.length, 0)
            position = place - start
            bucket = 0 if not mode.edges else (position.bit_length() if position else 0)
            found.setdefault(bucket, []).append(nats_after(document, start, place))
    return {bucket: (sum(nats), len(nats)) for bucket, nats in found.items()}


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_a_mode_adds_up_what_a_loop_over_its_targets_does(mode, store, nats_after):
    sums = add_up(model_of(config_of()), store, ByteTokenizer(), mode, batch_size=3)
    expected = naive(mode, store, nats_after)
    assert sums.nats.shape[1] == max(1, len(mode.edges) - 1) == len(expected)
    for bucket, (nats, tokens) in expected.items():
        assert sums.bucket(bucket).total("tokens") == tokens
        np.testing.assert_allclose(sums.bucket(bucket).total("nats"), nats, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES[:1], ids=mode_id)
def test_a_batch_of_one_finds_what_a_batch_of_many_does(mode, store):
    model = model_of(config_of())
    one, many = (add_up(model, store, ByteTokenizer(), mode, batch_size=size) for size in (1, 5))
    np.testing.assert_allclose(one.nats, many.nats, rtol=1e-6)
    assert all(np.array_equal(getattr(one, name), getattr(many, name)) for name in COUNTED[1:])


def test_devices_that_share_the_windows_find_what_one_does(store):
    mode, model = Windows(length=LENGTH, stride=10), model_of(config_of())
    alone = add_up(model, store, ByteTokenizer(), mode, batch_size=1)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:2])):
        assert BatchLosses(None, 1).batch_size == 2, "one window a device"
        shared = add_up(model, store, ByteTokenizer(), mode, batch_size=1)
    np.testing.assert_allclose(shared.nats, alone.nats, rtol=1e-6)


def test_windows_of_every_length_score_the_same_targets(store):
    run, every_target = run_of(), None
    for modes in (
        [Windows(length=length, stride=stride) for length, stride in ((16, 8), (64, 24))],
        [LastK(length=length, k=4, first=60) for length in (16, 64)],
    ):
        first, other = (measure(run, store, mode).sums for mode in modes)
        assert difference(first, other)["loss"].value != 0, "another context has another loss"
        every_target = every_target or first
    assert every_target is not None
    with pytest.raises(ValueError, match="not of the same targets"):
        difference(first, every_target)


def test_the_sums_of_all_documents_are_those_of_the_text(store):
    sums = add_up(model_of(config_of()), store, ByteTokenizer(), MODES[0], batch_size=3)
    assert sums.by_document("tokens").tolist() == (np.diff(store.offsets) + 1).tolist()
    assert sums.by_document("bytes").tolist() == store.text_bytes.tolist()
    assert sums.total("nats") == pytest.approx(sums.by_document("nats").sum())


@pytest.mark.parametrize("aggregation", ["gated", "none"])
def test_a_stream_over_a_document_is_one_window_as_long_as_it(store, aggregation):
    model = model_of(config_of(aggregation=aggregation))
    stream = add_up(model, store, ByteTokenizer(), Stream(chunk=16), batch_size=2)
    window = add_up(model, store, ByteTokenizer(), Windows(length=160, stride=160), batch_size=2)
    np.testing.assert_allclose(stream.nats, window.nats, rtol=1e-5)
    assert all(np.array_equal(getattr(stream, name), getattr(window, name)) for name in COUNTED[1:])


def test_a_stream_keeps_no_more_than_it_has_places_for():
    short, long = (store_of(["word " * words]) for words in (30, 400))
    gated, plain = (model_of(config_of(aggregation=aggregation)) for aggregation in ("gated", "none"))
    bounded = Stream(chunk=16, storage=Storage(max_cached=2, when_full="drop-oldest"))
    assert Stream(chunk=16).cache_bytes(gated, long) > 5 * Stream(chunk=16).cache_bytes(gated, short)
    for model, mode in ((gated, bounded), (plain, Stream(chunk=16))):
        assert mode.cache_bytes(model, long) == mode.cache_bytes(model, short)
    found = add_up(gated, long, ByteTokenizer(), bounded, batch_size=1)
    whole = add_up(gated, long, ByteTokenizer(), Stream(chunk=16), batch_size=1)
    assert found.total("nats") != whole.total("nats"), "dropped memories are missed"
    with pytest.raises(ValueError, match="max_cached 2 is less than the 18 segments"):
        add_up(gated, short, ByteTokenizer(), Stream(chunk=16, storage=Storage(max_cached=2)), batch_size=1)


def test_a_mode_by_name_has_the_windows_of_the_config():
    config = config_of(context_length=32)
    assert mode_of(config, "windows") == Windows(length=32, stride=16)
    assert mode_of(config, "last-k", last_k=8) == LastK(length=32, k=8, first=24)
    assert mode_of(config, "last-k", last_k=8, first=56) == LastK(length=32, k=8, first=56)
    assert mode_of(config, "stream") == Stream(chunk=32)
    assert mode_of(config, "by-position").edges == (0, 1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda config: mode_of(config, "last-k", last_k=8, first=23), "set first to 24 or more"),
        (lambda config: mode_of(config, "last-k", last_k=33), "not in 1 to the context length, 32"),
        (lambda config: mode_of(config, "windows", last_k=8), "no effect in mode 'windows'"),
        (lambda config: mode_of(config, "window"), "choose from windows, last-k, by-position, stream"),
        (
            lambda config: mode_of(config, "last-k", storage=Storage(max_cached=1)),
            "a storage has no effect in mode 'last-k'",
        ),
        (lambda _: Windows(length=8, stride=9), "set it from 1 to context_length, 8"),
    ],
)
def test_a_mode_that_cannot_be_says_why(make, told):
    with pytest.raises(ValueError, match=told):
        make(config_of(context_length=32))


def test_a_text_that_is_too_short_for_last_k_is_an_error(store):
    with pytest.raises(ValueError, match="no document has more than 500 targets"):
        measure(run_of(), store, LastK(length=16, k=4, first=500))

"""Adapters: what they add at first, what is trained, what is left once they are merged, runs with them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from test_step import CONFIG, VOCABULARY, _batch
from workplaces import make_workplace, tiny_run

from mc_jax._recipes import load_recipe
from mc_jax.cli import main
from mc_jax.config import Config, ConfigError, MeshConfig, validate
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.evaluation.dial import turn
from mc_jax.evaluation.summary import summarize_run
from mc_jax.nn import LanguageModel
from mc_jax.nn.adapters import Adapters, add_adapters, is_of_adapter, merged
from mc_jax.nn.block import SwiGLU
from mc_jax.parallel import make_mesh, on_mesh
from mc_jax.training import loop
from mc_jax.training.checkpoint import load_newest
from mc_jax.training.initial import Init
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.patterns import chosen_adapters, trained_part
from mc_jax.training.run import (
    abstract_state,
    adapters_of,
    count_parameters,
    load_run,
    model_shapes,
    new_state,
)
from mc_jax.training.step import (
    Parameters,
    by_name,
    from_names,
    make_step,
    merge_model,
    split_model,
)

pytestmark = pytest.mark.xdist_group("adapters")

MODELS = {
    "linear, gated": {},
    "delta, sparse, with attention": {
        "memory": "delta",
        "aggregation": "sparse",
        "top_k": 2,
        "layer_pattern": ("memory", "attention"),
    },
    "titans, residual": {"memory": "titans", "memory_depth": 1, "aggregation": "residual"},
    "dla, average": {"memory": "dla", "memory_depth": 2, "aggregation": "average", "top_k": 2},
    "attention": {"layer_pattern": ("attention",)},
}


def config_of(name: str = "linear, gated", rank: int | None = 2, **training) -> Config:
    training = dataclasses.replace(CONFIG.training, adapter_rank=rank, **training)
    return dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, **MODELS[name]), training=training
    )


@functools.cache
def stepped(config: Config, sizes: MeshConfig | None = None) -> tuple[Parameters, ...]:
    """Parameters before and after three steps."""
    devices = jax.devices()[:1] if sizes is None else jax.devices()[:4]
    with jax.set_mesh(make_mesh(sizes or MeshConfig(), devices)):
        graph, state = new_state(config, VOCABULARY)
        before = jax.tree.map(np.asarray, state.parameters)
        part = trained_part(config.training)
        step = make_step(graph, make_optimizer(config.training), 1, part=part)
        for count in range(3):
            state, _ = step(state, on_mesh(jax.tree.map(np.asarray, _batch(count)), 4), jnp.float32(1e-2))
        return before, jax.tree.map(np.asarray, state.parameters)


# What they add


@pytest.mark.parametrize("name", [name for name in MODELS if name != "linear, gated"])
def test_the_first_logits_are_those_without_adapters_to_the_bit(name):
    graph, state = new_state(config_of(name), VOCABULARY)
    plain_graph, plain = model_shapes(config_of(name), VOCABULARY)
    other = {key: x for key, x in by_name(state.parameters).items() if not is_of_adapter(key)}
    assert other.keys() == by_name(plain).keys()
    both = jax.jit(
        lambda tokens, one, other: (merge_model(graph, one)(tokens), merge_model(plain_graph, other)(tokens))
    )
    np.testing.assert_array_equal(*both(_batch()["inputs"], state.parameters, from_names(other)))


def test_all_other_weights_are_drawn_as_without_adapters():
    found = by_name(new_state(config_of(), VOCABULARY)[1].parameters)
    for name, expected in by_name(new_state(config_of(rank=None), VOCABULARY)[1].parameters).items():
        np.testing.assert_array_equal(found[name], expected, name)


def test_no_bit_changes_where_the_compiler_fuses_a_sum_with_what_follows():
    plain, adapted = (SwiGLU(16, 24, dtype=jnp.float32, rngs=nnx.Rngs(0)) for _ in range(2))
    add_adapters(adapted, Adapters(rank=2, maps=("gate", "input", "output")), nnx.Rngs(1))
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        x = jax.random.normal(jax.random.key(0), (4, 24, 16))
        found, expected = (jax.jit(lambda x, map=map: map(map(x)))(x) for map in (adapted, plain))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    np.testing.assert_array_equal(found, expected)


def test_a_merged_model_is_the_one_with_adapters():
    with jax.enable_x64():
        config = config_of()

        def build(adapters=None):
            return LanguageModel(
                config.model, VOCABULARY, dtype=jnp.float64, adapters=adapters, rngs=nnx.Rngs(0)
            )

        graph, shapes = split_model(nnx.eval_shape(lambda: build(adapters_of(config, VOCABULARY))))
        numbers = np.random.default_rng(0)
        drawn = jax.tree.map(lambda x: 0.3 * numbers.standard_normal(x.shape), shapes)
        plain = split_model(nnx.eval_shape(build))[0]
        tokens = np.asarray(_batch()["inputs"])
        logits = jax.jit(lambda p: merge_model(plain, p)(jnp.asarray(tokens)))
        with_adapters = jax.jit(lambda p: merge_model(graph, p)(jnp.asarray(tokens)))(drawn)
        assert with_adapters.dtype == jnp.float64
        as_one = logits(from_names(merged(by_name(drawn))))
        np.testing.assert_allclose(as_one, with_adapters, rtol=1e-9, atol=1e-9)
        left_out = logits(
            from_names({name: x for name, x in by_name(drawn).items() if not is_of_adapter(name)})
        )
        assert np.abs(left_out - with_adapters).max() > 1e-3


# What is trained


def test_adapters_alone_have_state():
    config = config_of()
    _, state = abstract_state(config, VOCABULARY)
    trained = sum(x.size for name, x in by_name(state.parameters).items() if is_of_adapter(name))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    assert moments == 2 * trained + 1, "two a trained number, and a count"
    counts = count_parameters(config, VOCABULARY)
    assert counts.trained == trained
    assert counts.model == count_parameters(config_of(rank=None), VOCABULARY).model


PARTLY = config_of(train=("router_query", "norm.scale"), freeze=("mlp.gate", "mixer.norm"))


def test_what_is_named_is_trained_whole_and_what_is_frozen_has_no_adapter():
    before, after = (by_name(parameters) for parameters in stepped(PARTLY))
    adapted = {name.partition(".lora.")[0] for name in after if is_of_adapter(name)}
    maps = ("query", "key", "value", "router_key", "output", "output_gate")
    assert adapted == {f"blocks_0.mixer.{name}" for name in maps} | {
        "blocks_0.mlp.input",
        "blocks_0.mlp.output",
    }
    whole = trained_part(PARTLY.training)
    assert whole is not None
    named = {name for name in by_name(whole(from_names(after))) if not is_of_adapter(name)}
    assert named == {"blocks_0.mixer.router_query.kernel", "norm.scale"}
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == named | {name for name in after if is_of_adapter(name)}


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"train": ("lora",)}, "training.train lora matches no parameter of the model"),
        ({"freeze": ("embedding",)}, "training.freeze embedding has no effect beside training.adapter_rank"),
        ({"freeze": ("blocks_0",)}, "leave no map an adapter"),
        (
            {"adapter_rank": 16},
            r"training.adapter_rank 16 is no low rank for \S+ \[16, 16\]; set it below 16",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(training, told):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(config_of().training, **training))
    with pytest.raises(ValueError, match=told):
        adapters_of(config, VOCABULARY)


def test_muon_which_takes_whole_maps_is_refused():
    with pytest.raises(
        ConfigError, match=r"training.optimizer 'muon' has no effect on .*; set it to 'adamw'"
    ):
        validate(config_of(optimizer="muon"))


def test_adapters_stand_beside_wide_maps_alone():
    shapes = {"blocks_0.mlp.gate.kernel": (1, 8, 9), "head.kernel": (8, 9), "embedding": (9, 8)}
    shapes |= {
        "blocks_0.mixer.step_size.map.kernel": (1, 8, 7),
        "blocks_0.mixer.online_logit.kernel": (1, 8, 7),
    }
    adapters = chosen_adapters(config_of().training, shapes)
    assert adapters is not None
    assert adapters.maps == ("blocks_0.mlp.gate",)


# Many devices


def test_training_on_a_mesh_is_that_on_one_device():
    alone, shared = (by_name(stepped(PARTLY, sizes)[1]) for sizes in (None, MeshConfig(fsdp=2, tensor=2)))
    for name in alone:
        np.testing.assert_allclose(shared[name], alone[name], atol=2e-4, err_msg=name)


def test_adapters_are_divided_as_their_maps_are():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        state = by_name(new_state(config_of(), VOCABULARY)[1].parameters)
    shapes = {
        name: state[f"blocks_0.{name}"].addressable_shards[0].data.shape
        for name in ("mlp.gate.lora.lora_a", "mlp.gate.lora.lora_b", "mlp.output.lora.lora_a")
    }
    assert list(shapes.values()) == [(2, 8, 2), (2, 2, 12), (2, 12, 2)]


# Runs

RUN = tiny_run(steps=4, warmup_steps=0, checkpoint_every=2)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = make_workplace(tmp_path_factory.mktemp("adapters"), RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        train(folder, "source", rank=None)
        train(folder, "adapted", "source")
        yield folder


def settings(workplace, *, rank: int | None = 2, steps=4, **training) -> Config:
    config = load_recipe(str(workplace / "tiny.py"))[2]
    training = dataclasses.replace(
        config.training, adapter_rank=rank, steps=steps, schedule="constant", **training
    )
    return dataclasses.replace(config, training=training)


def train(workplace, name, source=None, **options):
    init = None if source is None else Init(path=str(workplace / "runs" / source))
    loop.train(settings(workplace, **options), workplace / "runs" / name, init=init)


def weights(workplace, name):
    return by_name(split_model(load_run(workplace / "runs" / name).model)[1])


def saved(workplace, name):
    """The newest checkpoint's whole state."""
    run = load_run(workplace / "runs" / name)
    like = abstract_state(run.config, run.dataset.tokenizer.vocab_size)[1]
    loaded = load_newest(epath.Path(workplace / "runs" / name), like)
    assert loaded is not None
    return loaded.state


def test_a_run_is_read_back_with_its_adapters_merged(workplace):
    found, source = weights(workplace, "adapted"), weights(workplace, "source")
    state = by_name(saved(workplace, "adapted").parameters)
    assert found.keys() == source.keys()
    for name in source:
        a, b = (state.get(f"{name.removesuffix('.kernel')}.lora.lora_{which}") for which in "ab")
        if a is None:
            np.testing.assert_array_equal(found[name], source[name])
        else:
            np.testing.assert_array_equal(state[name], source[name], "the map itself is frozen")
            np.testing.assert_allclose(found[name], source[name] + np.asarray(a) @ np.asarray(b), atol=1e-6)
            assert not np.array_equal(found[name], source[name])
    run = turn(load_run(workplace / "runs" / "adapted"), {"model.aggregation": "residual"})
    assert "router_query" not in str(by_name(split_model(run.model)[1]).keys())


def test_in_a_run_both_factors_of_every_adapter_move_and_nothing_else(workplace):
    before = by_name(new_state(settings(workplace), ByteTokenizer().vocab_size)[1].parameters)
    before |= weights(workplace, "source")
    after = by_name(saved(workplace, "adapted").parameters)
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in after if is_of_adapter(name)}


def test_a_run_that_was_stopped_goes_on_to_the_bit(workplace):
    train(workplace, "stopped", "source", steps=2)
    train(workplace, "stopped", "source")
    jax.tree.map(np.testing.assert_array_equal, saved(workplace, "stopped"), saved(workplace, "adapted"))
    with pytest.raises(ValueError, match=r"training.adapter_rank 2 there, 3 here"):
        train(workplace, "stopped", "source", rank=3)
    config = epath.Path(workplace / "runs" / "stopped" / "config.json")
    config.write_text(config.read_text().replace('"adapter_rank": 2', '"adapter_rank": 3'))
    with pytest.raises(ValueError, match=r"training.adapter_rank was 2 and is 3; restore config.json"):
        load_run(workplace / "runs" / "stopped")


def test_another_run_begins_with_the_merged_weights(workplace, monkeypatch, capsys):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    train(workplace, "again", "adapted", steps=1)
    assert "parameters taken, its adapters merged into them" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, weights(workplace, "again"), weights(workplace, "adapted"))
    fresh = by_name(saved(workplace, "again").parameters)
    assert not any(np.any(x) for name, x in fresh.items() if name.endswith("lora_b"))
    init = Init(path=str(workplace / "runs" / "adapted"), state="full")
    with pytest.raises(ValueError, match="does not fit: adapters begin anew; leave --init-state out"):
        loop.train(settings(workplace), workplace / "runs" / "full", init=init)


def test_adapters_without_weights_to_begin_with_are_refused_in_one_line(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    assert main(["train", "tiny.py", "--name", "none", "--training.adapter-rank", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "training.adapter_rank 2 is for weights that were trained before; add --init RUN" in line
    assert not (workplace / "runs" / "none").exists()


def test_result_and_report_tell_what_was_trained(workplace):
    summarize_run(workplace / "runs" / "adapted")
    folder = workplace / "runs" / "adapted"
    result = json.loads((folder / "result.json").read_text())
    counts = count_parameters(load_run(folder).config, ByteTokenizer().vocab_size)
    assert (result["parameters"], result["trained_parameters"]) == counts
    assert f"{counts.trained:,} (" in (folder / "report.html").read_text()

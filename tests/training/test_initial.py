"""A run that begins with another's weights: what is taken, what is refused, what is told."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from workplaces import make_workplace, tiny_run

from mc_jax._recipes import load_recipe
from mc_jax.cli import main
from mc_jax.config import MeshConfig
from mc_jax.data.prepare import prepare
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.evaluation.perplexity import evaluate_run
from mc_jax.parallel import make_mesh
from mc_jax.training import loop
from mc_jax.training.checkpoint import load_newest, load_step
from mc_jax.training.initial import INIT_FILE, Init, initial_state, read_provenance
from mc_jax.training.initial.trees import compare, table
from mc_jax.training.run import model_shapes, new_state
from mc_jax.training.run_folder import opened
from mc_jax.training.step import by_name

RUN = tiny_run(steps=4, warmup_steps=0, checkpoint_every=2)
ROUTER = ("router_*", "online_logit")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = make_workplace(tmp_path_factory.mktemp("initial"), RUN)
    train(folder, "source", aggregation="none")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Trainings on one device, each program of which is compiled once."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def settings(workplace, steps=4, data=None, **model):
    config = load_recipe(str(workplace / "tiny.py"))[2]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(config.data, **(data or {})),
        training=dataclasses.replace(config.training, steps=steps),
    )


def train(workplace, name, init=None, *, steps=4, **model):
    return loop.train(settings(workplace, steps, **model), workplace / "runs" / name, init=init)


def begin(workplace, name, init=None, *, overwrite=False, data=None, **model):
    """Open a run's folder as its training does, and return the state that this begins with."""
    config = settings(workplace, data=data, **model)
    run = epath.Path(workplace / "runs" / name)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with opened(run, config, overwrite=overwrite, init=init) as folder, jax.set_mesh(mesh):
        folder.begin(0)
        if folder.provenance is None:
            return new_state(config, folder.dataset.tokenizer.vocab_size)[1]
        print(folder.provenance.told(run, 0, config))
        return initial_state(folder.provenance, config, folder.dataset)


def source(workplace, place="source", **options) -> Init:
    return Init(path=str(workplace / "runs" / place), **options)


def state_of(workplace, name, step=None):
    """The state in a checkpoint of a run without a router."""
    run = epath.Path(workplace / "runs" / name)
    like = new_state(settings(workplace, aggregation="none"), ByteTokenizer().vocab_size)[1]
    loaded = load_newest(run, like) if step is None else load_step(run, step, like)
    assert loaded is not None
    return loaded.state


def must_be_equal(state, other):
    jax.tree.map(np.testing.assert_array_equal, state, other)


# What is taken


def test_the_first_loss_is_that_of_the_source(workplace, monkeypatch, capsys):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    train(workplace, "same", source(workplace), steps=1, aggregation="none")
    assert evaluate_run(workplace / "runs" / "same") == evaluate_run(workplace / "runs" / "source")
    told = capsys.readouterr().out.splitlines()[0]
    assert "begins with --init" in told
    assert "(run folder, step 4): weights alone" in told
    provenance = read_provenance(epath.Path(workplace / "runs" / "same"))
    assert provenance is not None
    assert (provenance.step, provenance.kind, len(provenance.new)) == (4, "run folder", 0)


def test_a_checkpoint_is_named_by_its_folder_and_parameters_are_new_or_left_out_by_name(workplace):
    init = source(workplace, "source/checkpoints/2", new=ROUTER, drop=("router_key", "mlp.gate"))
    with pytest.raises(ValueError, match="--init-drop router_key matches no parameter of the checkpoint"):
        begin(workplace, "named", init, aggregation="gated")
    init = dataclasses.replace(init, drop=("mlp.gate",), new=(*ROUTER, "gate"))
    here = by_name(begin(workplace, "named", init, aggregation="gated").parameters)
    there = by_name(state_of(workplace, "source", 2).parameters)
    same = {name for name in here if name in there and np.array_equal(here[name], there[name])}
    router = {f"blocks_0.mixer.{name}.kernel" for name in ("router_query", "router_key", "online_logit")}
    assert here.keys() - same == router | {"blocks_0.mlp.gate.kernel"}


def test_another_vocabulary_keeps_the_rows_of_the_tokens_that_it_knows(workplace, capsys):
    text = workplace / "text.txt"
    prepare([text], workplace / "bpe", held_out=[workplace / "held.txt"], tokenizer="bpe", vocab_size=270)
    corpus = {"corpus": str(workplace / "bpe")}
    here = begin(workplace, "words", source(workplace), data=corpus, aggregation="none")
    assert "another vocabulary: 257 of 270 tokens kept their rows" in capsys.readouterr().out
    there = state_of(workplace, "source").parameters["embedding"]
    assert here.parameters["embedding"].shape == (270, 16)
    # Bytes and separator have the same ids everywhere.
    np.testing.assert_array_equal(here.parameters["embedding"][:257], there)
    with pytest.raises(ValueError, match="the vocabulary differ"):
        begin(workplace, "full", source(workplace, state="full"), data=corpus, aggregation="none")


def test_the_optimizer_is_taken_where_it_is_asked_for(workplace):
    there = state_of(workplace, "source")
    full = begin(workplace, "full", source(workplace, state="full"), aggregation="none")
    must_be_equal(full, there._replace(step=np.int32(0)))
    fresh = begin(workplace, "fresh", source(workplace), aggregation="none")
    must_be_equal(fresh.parameters, there.parameters)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh.optimizer)), "moments begin at 0"


# Begun once


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_weights(workplace, capsys):
    runs = workplace / "runs"
    shutil.copytree(runs / "source", runs / "moving")
    init = source(workplace, "moving")
    state = begin(workplace, "killed", init, aggregation="none")
    shutil.copytree(runs / "source" / "checkpoints" / "2", runs / "moving" / "checkpoints" / "5")
    must_be_equal(begin(workplace, "killed", init, aggregation="none"), state)

    train(workplace, "killed", init, aggregation="none", steps=2)
    shutil.rmtree(runs / "moving")  # needed no more
    capsys.readouterr()
    train(workplace, "killed", init, aggregation="none", steps=3)
    assert "goes on from its own step 2, which comes before --init" in capsys.readouterr().out
    shutil.rmtree(runs / "killed" / "checkpoints")
    with pytest.raises(ValueError, match="no such folder"):
        train(workplace, "killed", init, aggregation="none", steps=3)


def test_a_folder_goes_on_by_the_command_that_began_it_alone(workplace):
    init = source(workplace)
    begin(workplace, "begun", init, aggregation="none")
    began = r"began with --init \S*source; give the same"
    with pytest.raises(ValueError, match=began):
        begin(workplace, "begun", aggregation="none")
    with pytest.raises(ValueError, match=began):
        begin(workplace, "begun", source(workplace, "source/checkpoints/2"), aggregation="none")
    with pytest.raises(ValueError, match="did not begin from --init"):
        begin(workplace, "source", source(workplace, "begun"), aggregation="none")
    with pytest.raises(ValueError, match="of the run itself"):
        begin(workplace, "begun", source(workplace, "begun"), aggregation="none", overwrite=True)
    begin(workplace, "begun", init, aggregation="none", overwrite=True)
    assert (workplace / "runs" / "begun" / INIT_FILE).exists()
    begin(workplace, "begun", aggregation="none", overwrite=True)
    assert not (workplace / "runs" / "begun" / INIT_FILE).exists()


# Refused, and nothing written


def test_parameters_that_do_not_fit_are_listed_and_nothing_is_written(workplace, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    words = "train tiny.py --name refused --init runs/source --model.aggregation gated --model.mlp-dim 16"
    assert main(words.split()) == 2
    told = capsys.readouterr()
    assert told.out.splitlines()[1].split(maxsplit=2) == [
        "blocks_0.mixer.online_logit.kernel",
        "missing",
        "-                  [1, 16, 2]",
    ]
    assert "blocks_0.mlp.gate.kernel            reshaped  [1, 16, 32]        [1, 16, 16]" in told.out
    assert "missing: the checkpoint has none of that name: --init-new NAME draws it" in told.out
    (line,) = told.err.splitlines()
    assert "3 missing, 3 reshaped parameters" in line
    assert not (workplace / "runs" / "refused").exists()


def test_a_router_of_another_width_is_reshaped_and_may_be_drawn_anew(workplace):
    there, here = (
        {name: leaf.shape for name, leaf in by_name(model_shapes(config, 9)[1]).items()}
        for config in (settings(workplace, aggregation="gated", router_dim=dim) for dim in (None, 3))
    )
    maps = [f"blocks_0.mixer.{name}.kernel" for name in ("router_key", "router_query")]
    refused = compare(there, here, new=(), drop=()).unsettled
    assert [(found.name, found.kind) for found in refused] == [(name, "reshaped") for name in maps]
    assert {found.here for found in refused} == {(1, 16, 2 * 3)}
    fit = compare(there, here, new=("router_*",), drop=("router_*",))
    assert (list(fit.new), fit.unsettled) == (maps, ())


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "there is no such folder"),
        ("source/checkpoints", "neither a run's folder"),
        ("source/checkpoints/3", "there is no such folder"),
    ],
)
def test_what_is_no_run_and_no_checkpoint_is_refused(workplace, place, told):
    with pytest.raises(ValueError, match=told):
        begin(workplace, "none", source(workplace, place), aggregation="none")
    assert not (workplace / "runs" / "none").exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_one_used(workplace, capsys):
    copy = workplace / "runs" / "damaged"
    shutil.copytree(workplace / "runs" / "source", copy)
    (data,) = [
        file for file in (copy / "checkpoints" / "4").rglob("manifest.ocdbt") if "process" in str(file)
    ]
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"has no whole checkpoint to begin from \(step 4 is no use"):
        begin(workplace, "of damaged", source(workplace, "damaged/checkpoints/4"), aggregation="none")
    begin(workplace, "of damaged", source(workplace, "damaged"), aggregation="none")
    assert "step 2 is used" in capsys.readouterr().err
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"segment_length": 16', '"segment_length": 32'))
    with pytest.raises(ValueError, match=r"segment_length was 16 and is 32; restore config\.json"):
        begin(workplace, "of edited", source(workplace, "damaged"), aggregation="none")


@pytest.mark.parametrize("options", ["--init-state full", "--init-new x", "--init-drop x"])
def test_an_option_without_init_is_refused(options, capsys):
    assert main(["train", "quickstart", *options.split()]) == 2
    assert "has no effect without --init" in capsys.readouterr().err


# Whose settings


def test_the_model_is_the_sources_but_for_the_command_line(workplace, monkeypatch):
    calls = []

    def record(config, run_dir, **options):
        calls.append((config, options["init"]))
        raise ValueError("enough")

    monkeypatch.setattr(loop, "train", record)
    monkeypatch.chdir(workplace)
    words = "train quickstart --init runs/source --model.aggregation sparse --model.top-k 2 --init-new a b"
    with pytest.raises(ValueError, match="enough"):
        main(words.split())
    ((config, init),) = calls
    model = settings(workplace, aggregation="sparse", top_k=2).model
    assert config.model == model
    assert (config.data.corpus, config.data.tokenizer, config.data.vocab_size) == ("austen", "bytes", None)
    assert config.training == load_recipe("quickstart")[2].training
    assert init == Init(path="runs/source", new=("a", "b"))


def test_trees_are_compared_by_name_and_shape():
    there, here = {"a.b": (2,), "a.c": (2, 3), "x.d": (1,)}, {"a.b": (2,), "a.c": (2, 4), "y.e": (1,)}
    fit = compare(there, here, new=(), drop=())
    assert fit.taken == ("a.b",)
    assert [(one.name, one.kind) for one in fit.unsettled] == [
        ("a.c", "reshaped"),
        ("x.d", "extra"),
        ("y.e", "missing"),
    ]
    assert len(table(fit.unsettled).splitlines()) == 7
    fit = compare(there, here, new=("y", "c"), drop=("a.c", "[x-z].*"))
    assert (fit.taken, fit.new, fit.dropped, fit.unsettled) == (("a.b",), ("a.c", "y.e"), ("a.c", "x.d"), ())
    with pytest.raises(ValueError, match=r"--init-new b matches no parameter that the checkpoint lacks"):
        compare(there, here, new=("b",), drop=())

"""A run is planned for chips that are not here: from the command line, and as a function."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from planned_step import lowered_step
from tpu_topology import CHIPS as NAMES
from tpu_topology import four, lower_for

from mc_jax.cli import main
from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig
from mc_jax.planning import memory
from mc_jax.planning.chips import CHIPS
from mc_jax.planning.memory import capacity_of, refused_memory
from mc_jax.planning.plan import plan, vocabulary_of
from mc_jax.planning.program import operations
from mc_jax.planning.topology import read_topology
from mc_jax.training.step import TrainState

RECIPE = '''"""One layer, as shallow as recipes get."""

from mc_jax.config import Config, DataConfig, ModelConfig, TrainingConfig


def config():
    """Kernels want heads of 128."""
    model = ModelConfig(num_layers=1, model_dim=256, num_heads=2, mlp_dim=256)
    data = DataConfig(corpus="not/here", tokenizer=None, context_length=1024)
    return Config(model=model, data=data, training=TrainingConfig(batch_size=8, checkpoint_every=1))
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shallow.py").write_text(RECIPE)
    return tmp_path / "shallow.py"


def test_a_recipe_is_planned_for_tpus_from_the_command_line(recipe):
    four("v5e")
    # A process of its own: libtpu must be told before it starts to write schedules down.
    words = [sys.executable, "-m", "mc_jax.cli", "plan", str(recipe), "--topology", "v5e:2x2", "--json"]
    done = subprocess.run(
        [*words, "--vocab-size", "512"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["mesh"], found["rows"]) == ({"replica": 1, "fsdp": 4, "sequence": 1, "tensor": 1}, 2)
    assert found["vocabulary"] == 512
    needed, speed = found["memory"], found["speed"]
    assert sum(needed["parts"].values()) == needed["total"]
    assert needed["fits"]
    assert needed["parts"]["weights"] == 4 * sum(found["parameters"].values()) // 4 or (
        needed["parts"]["weights"] > found["parameters_total"]
    ), "small parameters are whole on all chips"
    assert speed["is_estimate"]
    assert speed["least_seconds"] <= speed["seconds"] <= speed["most_seconds"]
    assert 0 < speed["mfu"] < 1
    assert {axis for one in found["collectives"] for axis in one["axes"]} == {"fsdp"}
    kernels = {group["work"] for group in speed["groups"] if group["work"].startswith("kernel")}
    assert {"kernel linear_memory", "kernel state_read"} <= kernels
    parts = {group["part"] for group in speed["groups"]}
    assert {"MLP", "optimizer", "mixer, cached reads"} <= parts
    verdict = found["verdict"]
    assert verdict["fits"]
    assert verdict["hours"] == pytest.approx(1000 * speed["seconds"] / 3600)
    assert verdict["chip_hours"] == pytest.approx(4 * verdict["hours"])
    assert verdict["tokens_per_second_per_chip"] == pytest.approx(speed["tokens_per_second"] / 4)
    # What is compiled: the formula's, and what a kernel's blocks of states and tokens have too much.
    assert 1 <= speed["products"] * 4 / found["flops"]["step"] < 2


def test_a_recipe_is_planned_for_gpus_by_formula(recipe, capsys):
    assert main(["plan", str(recipe), "--topology", "h100:8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["chips"], found["vocabulary"], found["speed"]) == (8, 32_000, None)
    assert "assumed" in found["vocabulary_source"]
    parts = found["memory"]["parts"]
    assert parts["weights"] == found["parameters_total"] * 4 // 8
    assert parts["optimizer state"] == pytest.approx(2 * parts["weights"], rel=1e-3)
    assert parts["gradients"] == parts["weights"]
    assert not found["memory"]["is_compiled"]


def test_a_plan_begins_with_its_verdict(recipe, capsys):
    assert main(["plan", str(recipe), "--topology", "H100:8"]) == 0
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("fits, ")
    assert first.endswith(" of 74.51 GiB of a chip, by formula")
    assert second.startswith(
        "step time, MFU and tokens/s: not known, for nothing is compiled for GPUs; at the peak"
    )
    assert third.startswith("whole run: 1,000 steps, 8.2 M tokens; at that peak ")


def test_plans_are_laid_side_by_side(recipe, capsys):
    assert main(["plan", "--compare", f"{recipe}@h100:8", f"{recipe}@a100:4", "--vocab-size", "512"]) == 0
    out = capsys.readouterr().out
    assert "shallow on" in out
    assert "h100:8" in out
    assert "a100:4" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("plan", "which recipe? write mc-jax plan RECIPE --topology"),
        ("plan shallow.py", "which chips? give --topology, such as v5e:4x4"),
        (
            "plan shallow.py --topology v5q:4x4",
            "there is no chip 'v5q' in topology 'v5q:4x4'; known are v4,",
        ),
        ("plan shallow.py --topology pod", "there is no topology 'pod'; write CHIP:SIZES, such as v5e:4x4"),
        (
            "plan shallow.py --topology h100:2x4",
            "GPUs have a number, not sides as in 'h100:2x4'; write",
        ),
        ("plan shallow.py --topology h100:8 --slices 0", "0 slices of 'h100:8' have no chips"),
        ("plan shallow.py --topology h100:3", "training.batch_size 8 cannot be shared evenly"),
        ("plan shallow.py --topology h100:8 --vocab-size 0", "--vocab-size 0 is no size"),
        (
            "plan shallow.py --topology h100:8 h100:4 --search",
            "--search prints what it finds for one",
        ),
        ("plan --compare shallow.py", "'shallow.py' has no topology; write RECIPE@TOPOLOGY"),
        ("plan --compare shalow@h100:8", "there is no recipe 'shalow'"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, told, recipe, capsys):
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_slice_that_libtpu_does_not_know_is_a_mistake():
    four("v5e")
    no_such = dataclasses.replace(read_topology("v5e:2x2"), name="v5e:3x5x7")
    with pytest.raises(ValueError, match=r"libtpu knows no topology 'v5e:3x5x7'.*known are such as v5e:4x4"):
        no_such.devices()


def test_without_libtpu_the_cure_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scripts/setup aot"):
        plan(Config(), topology="v5e:2x2")


def test_the_vocabulary_is_told_without_a_corpus():
    assert vocabulary_of(Config(), 7) == (7, "as told")
    assert vocabulary_of(Config(data=DataConfig(tokenizer="bpe", vocab_size=4096)), None)[0] == 4096
    assert vocabulary_of(Config(), None)[0] == 257, "bytes and what ends documents"
    assert vocabulary_of(Config(data=DataConfig(corpus="not/here", tokenizer=None)), None)[0] == 32_000


@pytest.mark.parametrize("chip", NAMES)
def test_the_compiler_tells_how_much_memory_a_chip_has_for_programs(chip):
    found = capacity_of(four(chip)[0], 0)
    assert 0.9 < found / CHIPS[chip].memory < 1.1


def test_what_a_refused_step_lacks_is_read_off_the_message():
    weights = jax.ShapeDtypeStruct((2**28,), jnp.float32)
    state = TrainState({"w": weights}, (), jax.ShapeDtypeStruct((), jnp.int32))
    message = "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    found = refused_memory(message, state, {})
    assert found is not None
    assert not found.fits
    assert found.free == -4.25 * 2**30
    assert found.parts["weights"] == 2**30
    assert sum(found.parts.values()) == found.total
    assert refused_memory("scoped vmem limit exceeded", state, {}) is None


def test_a_step_that_does_not_fit_is_told_so(programs):
    model = ModelConfig(num_layers=2, model_dim=256, num_heads=2, mlp_dim=16_384, aggregation="none")
    training = TrainingConfig(batch_size=4 * 64)
    config = Config(model=model, data=DataConfig(context_length=4096), training=training)

    def planned():
        found = plan(config, topology="v5e:2x2", vocab_size=512, estimate=False).memory
        return {"total": found.total, "fits": found.fits}

    step = lowered_step(config, "v5e:2x2", vocabulary=512)
    found = programs.compiled(step, planned, [plan, memory])
    # Of two layers' MLPs alone a token leaves three times 16,384 numbers of two bytes.
    assert found["total"] > 2 * 3 * 16_384 * 2 * 64 * 4096
    assert not found["fits"]


def test_a_large_product_costs_what_one_counts_and_reaches_most_of_the_peak():
    size = 4096
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    found = list(operations(lower_for("v5e", jnp.matmul, x, x).compile().as_text()))
    assert sum(one.products for one in found) == 2 * size**3
    share = 2 * size**3 / CHIPS["v5e"].flops_per_cycle / sum(one.cycles for one in found)
    assert 0.85 < share < 1.0, f"the compiler's estimate of a large product is at {share:.2f} of the peak"


def test_products_of_many_pairs_of_matrices_are_counted_once_each():
    x = jax.ShapeDtypeStruct((16, 256, 128), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((16, 128, 384), jnp.bfloat16)
    found = operations(lower_for("v5e", jnp.matmul, x, y).compile().as_text())
    assert sum(one.products for one in found) == 2 * 16 * 256 * 128 * 384

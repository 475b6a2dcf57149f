"""A run's folder: what is in it, who may write to it, how a trained model is read back from it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset, open_data
from mc_jax.nn import LanguageModel
from mc_jax.parallel import has_mesh
from mc_jax.parallel.parameters import shardings
from mc_jax.parallel.processes import first_decides, must_agree
from mc_jax.training.checkpoint import Checkpoints
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.step import TrainState, init_state, merge_model, split_model
from pallas_kernels._platform import platform

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was read back."""

    folder: epath.Path
    config: Config
    dataset: Dataset
    model: LanguageModel
    step: int
    """Finished steps of the checkpoint."""


def prepare(run_dir: epath.Path, config: Config, *, overwrite: bool) -> Dataset:
    """Open a run's data and make its folder; process 0 decides and writes, and the others go with it.

    Raises:
      ValueError: `must_be_free` or `open_data` says no, or the processes differ in their settings or in what
        they see of the folder. Nothing is written in these cases, but in the last one.
    """
    dataset = None

    def make() -> None:
        nonlocal dataset
        must_be_free(run_dir, config, overwrite=overwrite)
        dataset = open_data(config.data, None if overwrite else run_dir / TOKENIZER_FILE)
        if overwrite and run_dir.exists():
            run_dir.rmtree()
        write_settings(run_dir, config, dataset)

    must_agree("settings", f"{run_dir} {overwrite} {configs.to_json(config)}")
    first_decides(make)
    if dataset is None:
        if not (run_dir / CONFIG_FILE).exists():
            raise ValueError(
                f"process {jax.process_index()} does not see {run_dir / CONFIG_FILE}, which process 0 has; "
                "set --runs-dir to a folder on a file system that all processes share"
            )
        dataset = open_data(config.data, run_dir / TOKENIZER_FILE)
    return dataset


def must_be_free(run_dir: epath.Path, config: Config, *, overwrite: bool) -> None:
    """See that the folder is empty, holds this very run, or holds a run that may be overwritten.

    Raises:
      ValueError: the folder holds something else; the differences are listed.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / CONFIG_FILE).exists():
        raise ValueError(f"{run_dir} is not empty and not a run; choose another name with --name")
    if overwrite:
        return
    earlier = configs.from_json((run_dir / CONFIG_FILE).read_text())
    # A run may go on on other devices.
    changed = configs.differences(dataclasses.replace(config, mesh=earlier.mesh), earlier)
    if changed:
        listed = ", ".join(f"{name} {old!r} there, {new!r} here" for name, (new, old) in changed.items())
        raise ValueError(f"{run_dir} holds another run ({listed}); choose another --name, or --overwrite it")


def write_settings(run_dir: epath.Path, config: Config, dataset: Dataset) -> None:
    """Write tokenizer and config, the config last: a folder that has one is a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / TOKENIZER_FILE).exists():
        dataset.tokenizer.save(run_dir / TOKENIZER_FILE)
    if not (run_dir / CONFIG_FILE).exists():
        part = run_dir / (CONFIG_FILE + ".part")
        part.write_text(configs.to_json(config))
        part.replace(run_dir / CONFIG_FILE)


def activation_dtype(config: Config) -> Any:
    """The dtype of activations: as configured, else float32 on CPU and bfloat16 elsewhere.

    The platform is that of the current mesh, which need not be here.
    """
    name = config.training.compute_dtype
    if name is None:
        name = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def new_state(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part and the training state before the first step, drawn from the config's seed.

    On the mesh of `jax.set_mesh` every device draws its own part of the state; without one it lies on the
    default device.
    """
    graph, draw = drawing(config, vocab_size)
    where = shardings(jax.eval_shape(draw)) if has_mesh() else None
    return graph, jax.jit(draw, out_shardings=where)()


def abstract_state(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, TrainState]:
    """As `new_state`, shapes with dtypes and shardings alone: to load a checkpoint, or to compile a step.

    It needs a mesh, whose devices need not be here.
    """
    graph, draw = drawing(config, vocab_size)
    state = jax.eval_shape(draw)
    return graph, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state)
    )


def drawing(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Callable[[], TrainState]]:
    """The model's static part, and the function that draws the training state before the first step."""

    def build():
        rngs = nnx.Rngs(params=config.training.seed)
        return LanguageModel(config.model, vocab_size, dtype=activation_dtype(config), rngs=rngs)

    optimizer = make_optimizer(config.training)
    graph = nnx.graphdef(nnx.eval_shape(build))
    return graph, lambda: init_state(split_model(build())[1], optimizer)


def load_run(run_dir: epath.PathLike) -> Run:
    """Read a run's config, tokenizer, data and newest checkpoint; the model lies on this process's device.

    Several processes must all call it.

    Raises:
      ValueError: no run there, or one without a checkpoint.
    """
    folder = epath.Path(run_dir)
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} is no run folder (it has no {CONFIG_FILE}); give one that mc-jax train made"
        )
    config = configs.from_json((folder / CONFIG_FILE).read_text())
    dataset = open_data(config.data, folder / TOKENIZER_FILE)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{folder} has no complete checkpoint yet; go on with mc-jax train")
        graph, state = new_state(config, dataset.tokenizer.vocab_size)
        state = checkpoints.load(step, state)
    return Run(folder, config, dataset, merge_model(graph, state.parameters), step)

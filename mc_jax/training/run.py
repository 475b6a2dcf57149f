"""A run as it is read back from its folder, and the state that its training starts from."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset, open_data
from mc_jax.nn import LanguageModel
from mc_jax.nn.adapters import Adapters, merged
from mc_jax.parallel import has_mesh
from mc_jax.parallel.parameters import shardings
from mc_jax.training.checkpoint import load_newest, load_part, load_step, must_be_finite, newest_whole
from mc_jax.training.checkpoint.folder import checkpoints_of
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.patterns import chosen_adapters, trained_part
from mc_jax.training.seal import make_seal, must_fit, newest_seal
from mc_jax.training.step import (
    Parameters,
    TrainState,
    by_name,
    from_names,
    init_state,
    merge_model,
    split_model,
)
from pallas_kernels._platform import platform

CONFIG_FILE = "config.json"
EXPORT_FILE = "export.json"
"""It tells where weights are from that are in a folder without the rest of their run."""
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
    trained: Config | None = None
    """What it was trained with, where `config` is another that it is read with; None: the same."""


class ParameterCounts(NamedTuple):
    """Numbers of a run's model."""

    model: int
    """Those of the model as it is evaluated, its adapters merged."""
    trained: int
    """Those that its training moves, in adapters and outside."""


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
    """Shapes of `new_state`, with dtypes and shardings: to load a checkpoint, or to compile a step.

    The devices of a mesh need not be here; without one all lies on the default device.
    """
    graph, draw = drawing(config, vocab_size)
    return graph, placed(jax.eval_shape(draw))


def placed[T](shapes: T) -> T:
    """Shapes with their shardings on the current mesh; without one all lies on the default device."""
    if has_mesh():
        where = shardings(shapes)
    else:
        here = jnp.zeros(()).sharding
        where = jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where
    )


def drawing(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Callable[[], TrainState]]:
    """The model's static part, and the function that draws the training state before the first step.

    The model has the adapters that are trained.
    """
    optimizer, part = make_optimizer(config.training), trained_part(config.training)
    adapters = adapters_of(config, vocab_size)
    graph = nnx.graphdef(nnx.eval_shape(lambda: _draw(config, vocab_size, adapters)))
    return graph, lambda: init_state(split_model(_draw(config, vocab_size, adapters))[1], optimizer, part)


def model_shapes(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Parameters]:
    """A model's static part and its parameters' shapes, as it is evaluated: without adapters."""
    return split_model(nnx.eval_shape(lambda: _draw(config, vocab_size)))


def adapters_of(config: Config, vocab_size: int) -> Adapters | None:
    """The adapters that a training has; None: none.

    Raises:
      ValueError: as of `chosen_adapters`.
    """
    if config.training.adapter_rank is None:
        return None
    parameters = by_name(model_shapes(config, vocab_size)[1])
    return chosen_adapters(config.training, {name: leaf.shape for name, leaf in parameters.items()})


def count_parameters(config: Config, vocab_size: int) -> ParameterCounts:
    """How many numbers a run's model has, and how many of them its training moves."""
    parameters = jax.eval_shape(drawing(config, vocab_size)[1]).parameters
    part = trained_part(config.training)
    moved = parameters if part is None else part(parameters)
    whole = parameters if config.training.adapter_rank is None else model_shapes(config, vocab_size)[1]
    return ParameterCounts(*(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (whole, moved)))


def without_adapters(parameters: Parameters) -> Parameters:
    """Parameters with the adapters merged into their maps."""
    return jax.jit(lambda named: from_names(merged(named)))(by_name(parameters))


def _draw(config: Config, vocab_size: int, adapters: Adapters | None = None) -> LanguageModel:
    rngs = nnx.Rngs(params=config.training.seed)
    dtype = activation_dtype(config)
    return LanguageModel(config.model, vocab_size, dtype=dtype, adapters=adapters, rngs=rngs)


def read_config(run_dir: epath.Path) -> Config:
    """The settings that a run's folder holds.

    Raises:
      ConfigError: the file is damaged, or of no config.
    """
    return configs.from_json((run_dir / CONFIG_FILE).read_bytes().decode(errors="replace"))


def load_run(run_dir: epath.PathLike, step: int | None = None) -> Run:
    """Read a run's config, tokenizer, data and a checkpoint; adapters are merged into their maps.

    A folder of weights alone, as `export_run` writes it, is read alike.

    The model lies on the mesh of `jax.set_mesh`, or else on this process's device. Several processes must all
    call it.

    Args:
      run_dir: the run's folder.
      step: of the checkpoint; None: the newest that is whole.

    Raises:
      ValueError: no run there, one without such a checkpoint, one that is no longer what was trained, or one
        whose weights are not finite.
    """
    folder = epath.Path(run_dir)
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} is no run folder (it has no {CONFIG_FILE}); give one that mc-jax train made"
        )
    config = read_config(folder)
    dataset = open_data(config.data, folder / TOKENIZER_FILE)
    must_fit(newest_seal(folder), make_seal(config, dataset), folder)
    if (folder / EXPORT_FILE).exists():
        return _load_exported(folder, step, config, dataset)
    graph, like = abstract_state(config, dataset.tokenizer.vocab_size)
    loaded = load_newest(folder, like) if step is None else load_step(folder, step, like)
    if loaded is None:
        raise ValueError(f"{folder} has no complete checkpoint yet; go on with mc-jax train")
    must_be_finite(folder, loaded, loaded.state.parameters)
    parameters = loaded.state.parameters
    if config.training.adapter_rank is not None:
        graph, _ = model_shapes(config, dataset.tokenizer.vocab_size)
        parameters = without_adapters(parameters)
    return Run(folder, config, dataset, merge_model(graph, parameters), loaded.step)


def _load_exported(folder: epath.Path, step: int | None, config: Config, dataset: Dataset) -> Run:
    """A run of which the weights alone are there."""
    found = newest_whole(folder, step)
    graph, shapes = model_shapes(config, dataset.tokenizer.vocab_size)
    loaded = load_part(checkpoints_of(folder) / str(found.step), {"parameters": placed(shapes)})
    return Run(folder, config, dataset, merge_model(graph, loaded["parameters"]), found.step)

"""A run's first state, with the weights of another run's checkpoint in it."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset
from mc_jax.data.tokenizer import Tokenizer
from mc_jax.nn.adapters import adapted_map, is_of_adapter, merged
from mc_jax.parallel.parameters import shardings
from mc_jax.training.checkpoint import (
    CHECKPOINTS_FOLDER,
    load_part,
    newest_whole,
    saved_shapes,
)
from mc_jax.training.checkpoint.digest import hash_of_digests
from mc_jax.training.initial.provenance import Provenance, asked_for
from mc_jax.training.initial.source import Init, Source, find_source
from mc_jax.training.initial.trees import CURES, Difference, compare, table
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.patterns import trained_part
from mc_jax.training.run import CONFIG_FILE, EXPORT_FILE, drawing, model_shapes, placed
from mc_jax.training.seal import must_fit, seal_of_settings
from mc_jax.training.step import TrainState, all_finite, by_name, from_names, init_state

_AXIS_OF_VOCABULARY = {"embedding": 0, "head.kernel": 1}


def examine(init: Init, config: Config, dataset: Dataset) -> Provenance:
    """See what a run would begin with, by this process alone; nothing is loaded, and nothing written.

    A table of what does not fit is printed.

    Args:
      init: what is asked for.
      config: the new run's settings.
      dataset: its data.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or it does not fit the model.
    """
    source = find_source(init.path)
    step, seal, has_digest = newest_whole(source.run, source.step)
    tokenizer = source.tokenizer()
    sealed = None if seal is None else (step, seal)
    must_fit(sealed, seal_of_settings(source.config) | {"tokenizer": tokenizer.fingerprint}, source.run)
    folder = source.run / CHECKPOINTS_FOLDER / str(step)
    there = {name: leaf.shape for name, leaf in saved_shapes(folder).items() if not is_of_adapter(name)}
    here = _shapes(config, dataset.tokenizer.vocab_size)
    rows = _rows(dataset.tokenizer, tokenizer)
    if rows is not None:
        there = {name: _with_vocabulary(name, shape, len(rows)) for name, shape in there.items()}
    fit = compare(there, here, new=init.new, drop=init.drop)
    if fit.unsettled:
        print(table(fit.unsettled), flush=True)
        raise ValueError(
            f"--init {init.path} (step {step}) does not fit the model: {_counted(fit.unsettled)}; "
            f"{_cure(fit.unsettled)}, or leave the model's settings as they were there"
        )
    if not fit.taken:
        raise ValueError(f"--init {init.path} gives the model none of its parameters; leave it out")
    if init.state == "full":
        _must_be_the_same_state(init, config, source, bool(fit.new or fit.dropped or rows is not None))
    return Provenance(
        asked=asked_for(init),
        kind=source.kind,
        run=str(source.run),
        step=step,
        config=configs.to_dict(source.config),
        tokenizer=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        config_sha256=hashlib.sha256((source.run / CONFIG_FILE).read_bytes()).hexdigest(),
        checkpoint_sha256=hash_of_digests(folder) if has_digest else None,
        taken=len(fit.taken),
        new=fit.new,
        dropped=fit.dropped,
        rows_kept=None if rows is None else int(np.sum(rows >= 0)),
        rows=dataset.tokenizer.vocab_size,
    )


def must_be_there(provenance: Provenance) -> None:
    """See that what a run began with is still the same, by this process alone.

    Raises:
      ValueError: it is gone, or another.
    """
    source = find_source(provenance.run)
    newest_whole(source.run, provenance.step)
    folder = source.run / CHECKPOINTS_FOLDER / str(provenance.step)
    if hash_of_digests(folder) != provenance.checkpoint_sha256:
        raise ValueError(
            f"{folder} is no longer the checkpoint that this run began with, and it has none of its own yet; "
            "put that back, or --overwrite the run"
        )


def initial_state(provenance: Provenance, config: Config, dataset: Dataset) -> TrainState:
    """The state before the first step, on the current mesh; all processes must call it.

    Args:
      provenance: what the run begins with, as `examine` has found it.
      config: the run's settings.
      dataset: its data.

    Raises:
      ValueError: the checkpoint is gone, or its weights are not finite.
    """
    source = find_source(provenance.run)
    folder = source.run / CHECKPOINTS_FOLDER / str(provenance.step)
    _, draw = drawing(config, dataset.tokenizer.vocab_size)
    wanted = jax.eval_shape(draw)
    saved = saved_shapes(folder)
    names = {name for name in by_name(wanted.parameters) if not is_of_adapter(name)} - set(provenance.new)
    # Those of the checkpoint are merged into the maps that are taken; the run's own are drawn.
    names |= {name for name in saved if is_of_adapter(name) and f"{adapted_map(name)}.kernel" in names}
    taken = from_names({name: saved[name] for name in sorted(names)})
    like = {"parameters": placed(taken)}
    if provenance.asked.state == "full":
        like["optimizer"] = placed(wanted.optimizer)
    loaded = load_part(folder, like)
    if provenance.checkpoint_sha256 is None and not all_finite(loaded):
        raise ValueError(f"{folder} holds numbers that are not finite; begin from another checkpoint")
    rows = None
    if provenance.rows_kept is not None:
        rows = _rows(dataset.tokenizer, source.tokenizer())
    optimizer, part = make_optimizer(config.training), trained_part(config.training)

    def begin(loaded) -> TrainState:
        parameters = by_name(draw().parameters)
        for name, values in merged(by_name(loaded["parameters"])).items():
            parameters[name] = _with_rows(name, values, parameters[name], rows)
        state = init_state(from_names(parameters), optimizer, part)
        return state._replace(optimizer=loaded.get("optimizer", state.optimizer))

    return jax.jit(begin, out_shardings=shardings(wanted))(loaded)


def _shapes(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in by_name(model_shapes(config, vocab_size)[1]).items()}


def _rows(tokenizer: Tokenizer, there: Tokenizer) -> np.ndarray | None:
    """Each token's row in the checkpoint's vocabulary, -1 without one; None: the tokenizers are alike."""
    if tokenizer.fingerprint == there.fingerprint:
        return None
    ids = {token: row for row, token in enumerate(there.token_bytes)}
    return np.array([ids.get(token, -1) for token in tokenizer.token_bytes], np.int32)


def _with_vocabulary(name: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    axis = _AXIS_OF_VOCABULARY.get(name)
    return shape if axis is None else (*shape[:axis], vocab_size, *shape[axis + 1 :])


def _with_rows(name: str, there: jax.Array, drawn: jax.Array, rows: np.ndarray | None) -> jax.Array:
    """A parameter of the checkpoint; one of the vocabulary keeps the rows of the tokens that it knew."""
    axis = _AXIS_OF_VOCABULARY.get(name)
    if rows is None or axis is None:
        return there.astype(drawn.dtype)
    kept = jnp.take(there.astype(drawn.dtype), np.maximum(rows, 0), axis=axis)
    return jnp.where(np.expand_dims(rows >= 0, 1 - axis), kept, drawn)


def _must_be_the_same_state(init: Init, config: Config, source: Source, is_changed: bool) -> None:
    """See that the optimizer's state is of the very parameters that are trained."""
    why = "parameters or the vocabulary differ" if is_changed else ""
    if any(one.training.adapter_rank is not None for one in (source.config, config)):
        why = "adapters begin anew"
    if (source.run / EXPORT_FILE).exists():
        why = "weights alone were exported"
    for name in ("optimizer", "train", "freeze"):
        there, here = getattr(source.config.training, name), getattr(config.training, name)
        if there != here:
            why = why or f"training.{name} is {there!r} there and {here!r} here"
    if why:
        raise ValueError(
            f"--init-state full takes the optimizer's state of {init.path}, which does not fit: {why}; "
            "leave --init-state out"
        )


def _counted(unsettled: tuple[Difference, ...]) -> str:
    kinds = [difference.kind for difference in unsettled]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in CURES if kind in kinds) + " parameters"


def _cure(unsettled: tuple[Difference, ...]) -> str:
    """Options that settle all, unless they are too many for a line."""
    new = sorted({difference.module for difference in unsettled})
    if len(new) > 6 or any(difference.kind != "missing" for difference in unsettled):
        return "the table above tells what to do"
    return f"add --init-new {' '.join(new)}"

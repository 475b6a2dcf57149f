"""What a run began with, as its folder tells: `init.json`."""

import dataclasses
import json
import shlex
from typing import Any, Literal

from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.files import write_json
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.training._buckets import absolute
from mc_jax.training.initial.source import Init, SourceSettings, find_source

INIT_FILE = "init.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which weights a run began with, and what was done to them."""

    asked: Init
    """What the command line asked for, the path from the root."""
    kind: str
    """What the path named."""
    run: str
    """The folder of the run whose weights they are."""
    step: int
    """Step of its checkpoint."""
    config: dict[str, Any]
    """What that run was trained with, as nested dicts."""
    tokenizer: Literal["bytes", "bpe"]
    """The kind of that run's tokenizer."""
    vocab_size: int
    """Tokens of that run's vocabulary."""
    config_sha256: str
    """Hash of its config.json."""
    checkpoint_sha256: str | None
    """Hash of the checkpoint's digests, and so of all its weights; None: an old one has none."""
    taken: int
    """Parameters that were taken."""
    new: tuple[str, ...]
    """Names of those that were drawn."""
    dropped: tuple[str, ...]
    """Names of the checkpoint's that were left out."""
    rows_kept: int | None
    """Tokens of the vocabulary that the checkpoint knew; None: the tokenizer is the same."""
    rows: int
    """Tokens of this run's vocabulary."""

    @property
    def source_config(self) -> Config:
        """What the run whose weights they are was trained with."""
        return configs.from_dict(json.loads(json.dumps(self.config)))

    def weights(self) -> str:
        """One line that is another for other weights."""
        return f"{self.run} step {self.step} {self.checkpoint_sha256 or 'without a digest'}"

    def told(self, run_dir: epath.Path, step: int, config: Config) -> str:
        """What people are told when a run begins with it, or goes on from a step of its own."""
        if step:
            return (
                f"{run_dir} goes on from its own step {step}, which comes before --init {self.asked.path}: "
                "with that it began"
            )
        changed = {
            name: values
            for name, values in configs.differences(self.source_config, config).items()
            if name.startswith(("model.", "data."))
        }
        told = ", ".join(f"{name} {there!r} -> {here!r}" for name, (there, here) in changed.items())
        begins = f"{run_dir} begins with --init {self.summary()}"
        begins += f"; settings of model and data that differ: {told or 'none'}"
        cached = AGGREGATION_FACTS[self.source_config.model.aggregation].reads_cache
        if "model.aggregation" in changed and not cached:
            begins += (
                "; with a scale of 0 the added memory changes nothing yet"
                if config.model.cache_scale
                else "; the added memory changes the model at once, unless --model.cache-scale learned"
            )
        return begins

    def summary(self) -> str:
        """One line for people."""
        what = "weights and optimizer" if self.asked.state == "full" else "weights alone"
        told = f"{self.asked.path} ({self.kind}, step {self.step}): {what}, {self.taken} parameters taken"
        if self.source_config.training.adapter_rank is not None:
            told += ", its adapters merged into them"
        told += f", {len(self.new)} new ({_listed(self.new)})" if self.new else ""
        told += f", {len(self.dropped)} left out ({_listed(self.dropped)})" if self.dropped else ""
        if self.rows_kept is not None:
            told += f", another vocabulary: {self.rows_kept:,} of {self.rows:,} tokens kept their rows"
        return told


def asked_for(init: Init) -> Init:
    """What was asked for, the path from the root, so that it is the same from wherever it is asked again."""
    return dataclasses.replace(init, path=str(absolute(epath.Path(init.path).expanduser())))


def settings_of(path: str, run_dir: epath.Path | None) -> SourceSettings:
    """The settings of a run that weights are taken from.

    Args:
      path: as `--init` names it.
      run_dir: the folder of the run that begins with them, whose own file tells once it has begun; None: it
        begins anew.

    Raises:
      ValueError: there is no such run.
    """
    recorded = None if run_dir is None else read_provenance(run_dir)
    if recorded is None or recorded.asked.path != asked_for(Init(path=path)).path:
        return find_source(path).settings()
    return SourceSettings(
        model=recorded.source_config.model, tokenizer=recorded.tokenizer, vocab_size=recorded.vocab_size
    )


def must_be_the_same(run_dir: epath.Path, recorded: Provenance | None, init: Init | None) -> None:
    """See that a run goes on by the command that began it, as far as `--init` is concerned.

    Raises:
      ValueError: it does not.
    """
    if init is None and recorded is None:
        return
    if recorded is None:
        assert init is not None
        raise ValueError(
            f"{run_dir} holds a run that did not begin from --init {init.path}; choose another --name, "
            "go on with it without --init, or --overwrite it"
        )
    if init is None or asked_for(init) != recorded.asked:
        raise ValueError(
            f"{run_dir} holds a run that began with {_options(recorded.asked)}; "
            "give the same to go on with it, or choose another --name"
        )


def read_provenance(run_dir: epath.Path) -> Provenance | None:
    """What a run began with; None: with weights that were drawn.

    Raises:
      ValueError: the file is damaged.
    """
    path = run_dir / INIT_FILE
    if not path.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        asked = values.pop("asked")
        values |= {name: tuple(values[name]) for name in ("new", "dropped")}
        asked |= {name: tuple(asked[name]) for name in ("new", "drop")}
        return Provenance(asked=Init(**asked), **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or train under another --name"
        ) from None


def write_provenance(run_dir: epath.Path, provenance: Provenance) -> None:
    """Write what a run begins with, whole or not at all."""
    write_json(run_dir / INIT_FILE, dataclasses.asdict(provenance))


def _options(init: Init) -> str:
    words = ["--init", init.path]
    words += ["--init-state", init.state] if init.state != "weights" else []
    words += ["--init-new", *init.new] if init.new else []
    words += ["--init-drop", *init.drop] if init.drop else []
    return shlex.join(words)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"

"""The checkpoint that `--init` names: which run it is of, with which settings and tokenizer."""

import dataclasses
import re
from typing import Literal

from etils import epath

from mc_jax.config import Config, DataConfig, ModelConfig
from mc_jax.data.corpus import CORPORA
from mc_jax.data.dataset import embedded_tokenizer_fits
from mc_jax.data.tokenizer import Tokenizer, load_tokenizer
from mc_jax.training._buckets import absolute
from mc_jax.training.checkpoint import CHECKPOINTS_FOLDER
from mc_jax.training.run import CONFIG_FILE, EXPORT_FILE, TOKENIZER_FILE, read_config

StateToTake = Literal["weights", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Settings of a run that its weights stand or fall with."""

    model: ModelConfig
    """The model that has them."""
    tokenizer: Literal["bytes", "bpe"]
    """The kind of its tokenizer."""
    vocab_size: int
    """Tokens of its vocabulary."""

    def in_place(self, config: Config, corpus: str) -> Config:
        """A recipe's settings with these: the model, and the tokenizer of an embedded corpus.

        A prepared folder has its own tokenizer.
        """
        data = config.data
        if corpus in CORPORA:
            size = self.vocab_size if self.tokenizer == "bpe" else None
            data = dataclasses.replace(data, tokenizer=self.tokenizer, vocab_size=size)
        return dataclasses.replace(config, model=self.model, data=data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """What a run is to begin with."""

    path: str
    """A run's folder, that of one of its checkpoints, or one of exported weights."""
    state: StateToTake = "weights"
    """"full" takes the optimizer's state, too."""
    new: tuple[str, ...] = ()
    """Patterns of parameters that the checkpoint may lack: they are drawn."""
    drop: tuple[str, ...] = ()
    """Patterns of parameters of the checkpoint that are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A run that weights are taken from."""

    kind: Literal["run folder", "checkpoint", "exported weights"]
    """What the path named."""
    run: epath.Path
    """The run's folder."""
    step: int | None
    """The checkpoint's step; None: the newest whole one."""
    config: Config
    """What the run was trained with."""

    @property
    def tokenizer_file(self) -> epath.Path:
        """The file of the run's tokenizer."""
        return self.run / TOKENIZER_FILE

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.tokenizer_file)

    def settings(self) -> SourceSettings:
        """What its weights stand or fall with."""
        tokenizer = self.tokenizer()
        return SourceSettings(
            model=self.config.model, tokenizer=tokenizer.kind, vocab_size=tokenizer.vocab_size
        )

    def tokenizer_file_for(self, data: DataConfig) -> epath.Path | None:
        """The run's tokenizer, if text is to be encoded by it; None: the data has, or makes, its own."""
        if data.corpus in CORPORA and embedded_tokenizer_fits(data, self.tokenizer()):
            return self.tokenizer_file
        return None


def find_source(path: epath.PathLike) -> Source:
    """See what a path is: a run's folder, `checkpoints/STEP` in one, or a folder of exported weights.

    Raises:
      ValueError: it is neither, or the run's config.json is damaged; one line with the cure.
    """
    folder = absolute(epath.Path(path).expanduser())
    if (folder / CONFIG_FILE).exists():
        kind = "exported weights" if (folder / EXPORT_FILE).exists() else "run folder"
        return Source(kind=kind, run=folder, step=None, config=read_config(folder))
    if not folder.exists():
        raise ValueError(f"--init {path}: there is no such folder; give a run's, or RUN/checkpoints/STEP")
    run = folder.parent.parent
    is_step = folder.parent.name == CHECKPOINTS_FOLDER and re.fullmatch("0|[1-9][0-9]*", folder.name)
    if is_step and (run / CONFIG_FILE).exists():
        return Source(kind="checkpoint", run=run, step=int(folder.name), config=read_config(run))
    if is_step:
        raise ValueError(
            f"--init {path}: a checkpoint whose run's {CONFIG_FILE} is gone; put that and {TOKENIZER_FILE} "
            f"back into {run}"
        )
    raise ValueError(
        f"--init {path}: neither a run's folder (it has no {CONFIG_FILE}) nor RUN/{CHECKPOINTS_FOLDER}/STEP"
    )

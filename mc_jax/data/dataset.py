"""What a run reads: a tokenizer and the two splits, from an embedded corpus or a prepared folder."""

import dataclasses
import difflib
from pathlib import Path

from etils import epath

from mc_jax.config import DataConfig
from mc_jax.data.corpus import CORPORA, load_corpus
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.files import read_json
from mc_jax.data.store import TokenStore, memory_store, open_store
from mc_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

KIND, VERSION = "prepared folder", 1
MANIFEST_FILE, TOKENIZER_FILE, TRAIN, HELD_OUT = "manifest.json", "tokenizer.json", "train", "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A tokenizer and the documents that it tokenized."""

    tokenizer: Tokenizer
    """What turns text into the ids of both stores."""
    train: TokenStore
    """What the model learns from."""
    held_out: TokenStore | None
    """What it is scored on; None: the prepared folder has no such part."""


def open_data(config: DataConfig, tokenizer_path: epath.PathLike | None = None) -> Dataset:
    """Open the data that a config names.

    Args:
      config: corpus and tokenizer.
      tokenizer_path: the tokenizer that a run saved. If the file exists it is used, and must be the one
        that the config describes; else the tokenizer is made. Nothing is written.

    Raises:
      ValueError: no such corpus, settings that do not fit it, or damaged files; one line with the cure.
    """
    saved = None
    if tokenizer_path is not None and epath.Path(tokenizer_path).exists():
        saved = load_tokenizer(tokenizer_path)
    if config.corpus in CORPORA:
        return _open_embedded(config, saved, tokenizer_path)
    folder = Path(config.corpus).expanduser()
    if not folder.is_dir():
        raise ValueError(_unknown(config.corpus, folder))
    for field in ("tokenizer", "vocab_size"):
        if getattr(config, field) is not None:
            raise ValueError(
                f"data.{field} {getattr(config, field)!r} has no effect: {folder} has its own tokenizer; "
                f"set data.{field} to None"
            )
    dataset = open_prepared(folder)
    if saved is not None and saved.fingerprint != dataset.tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was prepared with another tokenizer than {tokenizer_path}; "
            f"prepare it with mc-jax prepare --tokenizer {tokenizer_path}"
        )
    return dataset


def open_prepared(folder: Path) -> Dataset:
    """Open a folder that `prepare` wrote.

    Raises:
      ValueError: not such a folder, a damaged one, or one whose parts do not belong together.
    """
    cure = "write the folder with mc-jax prepare"
    fields = ("fingerprint", "splits")
    manifest = read_json(folder / MANIFEST_FILE, kind=KIND, version=VERSION, fields=fields, cure=cure)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != manifest["fingerprint"]:
        raise ValueError(f"{folder / TOKENIZER_FILE} is not the tokenizer {folder} was written with; {cure}")
    return Dataset(
        tokenizer=tokenizer,
        train=open_store(folder / TRAIN, tokenizer),
        held_out=open_store(folder / HELD_OUT, tokenizer) if HELD_OUT in manifest["splits"] else None,
    )


def embedded_tokenizer_fits(config: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of the kind and size that the settings of an embedded corpus ask for."""
    return tokenizer.kind == config.tokenizer and config.vocab_size in (None, tokenizer.vocab_size)


def _open_embedded(
    config: DataConfig, saved: Tokenizer | None, tokenizer_path: epath.PathLike | None
) -> Dataset:
    if config.tokenizer is None:
        raise ValueError(
            f"corpus {config.corpus!r} is plain text and data.tokenizer is None; set it to 'bytes' or 'bpe'"
        )
    corpus = load_corpus(config.corpus)
    tokenizer = saved or _make_tokenizer(config, corpus.train)
    if not embedded_tokenizer_fits(config, tokenizer):
        raise ValueError(
            f"{tokenizer_path} is a {tokenizer.kind!r} tokenizer of {tokenizer.vocab_size} ids, not what "
            f"data.tokenizer {config.tokenizer!r} and data.vocab_size {config.vocab_size} ask for; "
            "set them as they were, or start a new run"
        )
    return Dataset(
        tokenizer=tokenizer,
        train=memory_store(tokenize(corpus.train, tokenizer), tokenizer),
        held_out=memory_store(tokenize(corpus.held_out, tokenizer), tokenizer),
    )


def _make_tokenizer(config: DataConfig, documents: list[Document]) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.vocab_size is None:
        raise ValueError("data.tokenizer 'bpe' has no size; set data.vocab_size, for example to 4096")
    return train_bpe((document.text for document in documents), config.vocab_size)


def _unknown(name: str, folder: Path) -> str:
    neighbours = [path.name for path in folder.parent.glob("*/") if (path / MANIFEST_FILE).is_file()]
    near = difflib.get_close_matches(folder.name, [*CORPORA, *neighbours], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"data.corpus {name!r} is no embedded corpus and no folder; {hint}"
        f"embedded is {', '.join(CORPORA)}, and mc-jax prepare writes a folder from text files"
    )

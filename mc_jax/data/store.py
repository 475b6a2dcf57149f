"""Token stores: a split's documents as one long array, in memory or mapped from a folder.

Shapes: N tokens of all documents, P documents. Separators are not stored: a document of n tokens stands for
the sequence separator, its n tokens, separator, and so for n + 1 (input, target) pairs.

A folder holds tokens.bin (little-endian uint16 or uint32), offsets.npy, text_bytes.npy, names.txt and
manifest.json; scored.bin, a byte a pair, where not every pair is scored. It is written under another name and
renamed when it is whole.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mc_jax.data.documents import TokenizedDocument
from mc_jax.data.files import new_folder, read_json, write_json
from mc_jax.data.tokenizer import Tokenizer

_KIND = "token store"
_VERSION, _VERSION_WITH_SCORED = 1, 2  # who does not know scored.bin must not read past it
_MANIFEST = "manifest.json"
_FILES = ("tokens.bin", "offsets.npy", "text_bytes.npy", "names.txt")
_SCORED = "scored.bin"
_CURE = "write it again with mc-jax prepare"
# Larger files are checked by their size alone: to hash a terabyte at every start would take an hour.
_HASHED_BYTES = 256 << 20
_BLOCK = 1 << 18  # numbers of a larger one's parts that are hashed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStore:
    """The documents of a split; `len` counts them."""

    tokens: np.ndarray
    """uint16 or uint32 [N], document after document, without separators."""
    offsets: np.ndarray
    """int64 [P + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    text_bytes: np.ndarray
    """int64 [P], UTF-8 bytes of what is scored of each document's text."""
    names: Sequence[str]
    """[P], the sources, for people."""
    separator_id: int
    """The id that begins and ends every document."""
    vocab_size: int
    """All ids are below it."""
    fingerprint: str
    """The tokenizer's."""
    scored: np.ndarray | None = None
    """bool [N + P], which pairs are learned and scored, document after document; None: all."""
    folder: Path | None = None
    """The folder that it lies in; None: in memory."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all that is scored: what bits per byte are counted over."""
        return int(self.text_bytes.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without separators."""
        return int(self.offsets[-1])

    @property
    def num_pairs(self) -> int:
        """(input, target) pairs of all documents: one more than tokens in each."""
        return self.num_tokens + len(self)

    @functools.cached_property
    def num_scored(self) -> int:
        """Pairs that are scored."""
        return self.num_pairs if self.scored is None else int(np.count_nonzero(self.scored))

    def content_hash(self) -> str:
        """SHA-256 (hex) of what training and evaluation read, wherever it lies and whatever it is called.

        Of arrays too large to be read at every start, evenly spaced blocks.
        """
        digest = hashlib.sha256(f"{self.tokens.dtype.name} {self.separator_id} {self.fingerprint}".encode())
        masks = () if self.scored is None else (self.scored,)
        for values in (self.tokens, self.offsets, self.text_bytes, *masks):
            digest.update(f" {values.size} ".encode())
            parts = [values]
            if values.nbytes > _HASHED_BYTES:
                starts = np.linspace(0, values.size - _BLOCK, _HASHED_BYTES // _BLOCK // values.itemsize)
                parts = [values[start : start + _BLOCK] for start in starts.astype(np.int64)]
            for part in parts:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def document(self, index: int) -> np.ndarray:
        """A document's tokens, int32 [tokens], without separators."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)

    def sequence(self, index: int, start: int, stop: int) -> np.ndarray:
        """Places `start` to `stop` of the sequence separator, tokens, separator; int32 [stop - start].

        Raises:
          ValueError: a token is outside the vocabulary; a model's embedding would take another one for it.
        """
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        sequence = np.full(stop - start, self.separator_id, np.int32)
        first, last = max(start - 1, 0), min(stop - 1, end - begin)
        if first < last:
            sequence[first + 1 - start : last + 1 - start] = self.tokens[begin + first : begin + last]
        if sequence.size and not 0 <= sequence.min() <= (largest := sequence.max()) < self.vocab_size:
            raise ValueError(
                f"{self.folder or 'the store in memory'}: document {index} has token {largest}, outside the "
                f"vocabulary of {self.vocab_size}; {_CURE}"
            )
        return sequence

    def is_scored(self, index: int, start: int, stop: int) -> np.ndarray:
        """Which of a document's pairs `start` to `stop` are scored, bool [stop - start]."""
        if self.scored is None:
            return np.ones(stop - start, bool)
        begin = int(self.offsets[index]) + index
        return np.asarray(self.scored[begin + start : begin + stop])


def memory_store(documents: Iterable[TokenizedDocument], tokenizer: Tokenizer) -> TokenStore:
    """Keep tokenized documents in memory.

    Raises:
      ValueError: there are none.
    """
    documents = list(documents)
    if not documents:
        raise ValueError("there is no text in the documents; give at least one that is not empty")
    ends = [place for place, document in enumerate(documents) if not document.continues]
    firsts = [0, *(end + 1 for end in ends[:-1])]
    lengths = [len(document.tokens) for document in documents]
    text_bytes = [document.text_bytes for document in documents]
    is_partly = any(document.scored is not None for document in documents)
    return TokenStore(
        scored=np.concatenate([_mask(document) for document in documents]) if is_partly else None,
        tokens=np.concatenate([document.tokens for document in documents]).astype(_token_dtype(tokenizer)),
        offsets=np.concatenate([[0], np.cumsum(lengths)[ends]]).astype(np.int64),
        text_bytes=np.add.reduceat(np.array(text_bytes, np.int64), firsts),
        names=[documents[first].name for first in firsts],
        separator_id=tokenizer.separator_id,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
    )


def write_store(folder: Path, documents: Iterable[TokenizedDocument], tokenizer: Tokenizer) -> TokenStore:
    """Write tokenized documents to a new folder, one at a time, and open it.

    Args:
      folder: where to; must not exist, or be empty.
      documents: in the order in which they are stored; only their lengths are kept in memory.
      tokenizer: what they were tokenized with.

    Raises:
      ValueError: the folder is taken, or there are no documents. Nothing is left behind.
    """
    with store_writer(folder, tokenizer) as add:
        for document in documents:
            add(document)
    return open_store(folder)


@contextlib.contextmanager
def store_writer(folder: Path, tokenizer: Tokenizer) -> Generator[Callable[[TokenizedDocument], None]]:
    """Yield what adds a document to a new folder, which is there, whole, at the end; `write_store` says how.

    Raises:
      ValueError: the folder is taken, or nothing was added. Nothing is left behind.
    """
    must_be_free(folder)
    dtype = _token_dtype(tokenizer)
    with new_folder(folder) as partial:
        with _Writer(partial, dtype) as writer:
            yield writer.add
        files = (*_FILES, *([_SCORED] if writer.is_partly else []))
        if not writer.text_bytes:
            raise ValueError(f"there is no text to write to {folder}; give at least one document with text")
        np.save(partial / "offsets.npy", np.array(writer.offsets, np.int64))
        np.save(partial / "text_bytes.npy", np.array(writer.text_bytes, np.int64))
        write_json(
            partial / _MANIFEST,
            {
                "kind": _KIND,
                "version": _VERSION_WITH_SCORED if writer.is_partly else _VERSION,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "separator_id": tokenizer.separator_id,
                "dtype": dtype.name,
                "documents": len(writer.text_bytes),
                "tokens": writer.offsets[-1],
                "text_bytes": sum(writer.text_bytes),
                "files": {name: _measure(partial / name) for name in files},
            },
        )


class _Writer(contextlib.ExitStack):
    """The files of a store that grow with each document."""

    def __init__(self, folder: Path, dtype: np.dtype):
        super().__init__()
        self._dtype = dtype
        self._tokens = self.enter_context((folder / "tokens.bin").open("wb"))
        self._names = self.enter_context((folder / "names.txt").open("w", encoding="utf-8"))
        self._scored_path = folder / _SCORED
        self._scored: BinaryIO | None = None
        self._continues = False
        self.offsets, self.text_bytes = array.array("q", [0]), array.array("q")

    @property
    def is_partly(self) -> bool:
        """Whether not every pair is scored."""
        return self._scored is not None

    def add(self, document: TokenizedDocument) -> None:
        """Write a document, or a part of one."""
        if document.scored is not None and self._scored is None:
            self._scored = self.enter_context(self._scored_path.open("wb"))
            before = self.offsets[-1] + len(self.text_bytes)
            for begin in range(0, before, _BLOCK):
                self._scored.write(np.ones(min(_BLOCK, before - begin), bool).data)
        if self._scored is not None:
            self._scored.write(_mask(document).data)
        self._tokens.write(document.tokens.astype(self._dtype).data)
        if self._continues:
            self.offsets[-1] += len(document.tokens)
            self.text_bytes[-1] += document.text_bytes
        else:
            self._names.write(json.dumps(document.name) + "\n")
            self.offsets.append(self.offsets[-1] + len(document.tokens))
            self.text_bytes.append(document.text_bytes)
        self._continues = document.continues


def open_store(folder: Path, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Map a store that `write_store` wrote.

    Args:
      folder: the store.
      tokenizer: what the store must have been tokenized with; None: any.

    Raises:
      ValueError: missing, damaged, or written with another tokenizer; one line with path and cure.
    """
    folder = Path(folder)
    fields = ("fingerprint", "vocab_size", "separator_id", "dtype", "files")
    versions = (_VERSION, _VERSION_WITH_SCORED)
    manifest = read_json(folder / _MANIFEST, kind=_KIND, version=versions, fields=fields, cure=_CURE)
    is_partly = manifest["version"] == _VERSION_WITH_SCORED
    for name in (*_FILES, *([_SCORED] if is_partly else [])):
        path, expected = folder / name, manifest["files"].get(name)
        if not path.is_file() or _measure(path) != expected:
            raise ValueError(f"{path} is missing or not as it was written; {_CURE}")
    if tokenizer is not None and (tokenizer.fingerprint, tokenizer.vocab_size) != (
        manifest["fingerprint"],
        manifest["vocab_size"],
    ):
        raise ValueError(f"the tokens in {folder} are of another tokenizer than the one beside them; {_CURE}")
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", np.dtype(manifest["dtype"]).newbyteorder("<"), "r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        text_bytes=np.load(folder / "text_bytes.npy", mmap_mode="r"),
        names=_Names(folder / "names.txt"),
        scored=np.memmap(folder / _SCORED, bool, "r") if is_partly else None,
        separator_id=manifest["separator_id"],
        vocab_size=manifest["vocab_size"],
        fingerprint=manifest["fingerprint"],
        folder=folder,
    )


def must_be_free(folder: Path) -> None:
    """See that nothing would be overwritten.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder, or delete it first")


class _Names(Sequence[str]):
    """The lines of names.txt, read when one is asked for: training never does."""

    def __init__(self, path: Path):
        self._path = path
        self._names: list[str] | None = None

    def __getitem__(self, index: Any) -> Any:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> list[str]:
        if self._names is None:
            with self._path.open(encoding="utf-8") as lines:
                self._names = [json.loads(line) for line in lines]
        return self._names


def _mask(document: TokenizedDocument) -> np.ndarray:
    if document.scored is not None:
        return document.scored
    return np.ones(len(document.tokens) + (not document.continues), bool)


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _measure(path: Path) -> dict[str, Any]:
    measures: dict[str, Any] = {"bytes": path.stat().st_size}
    if measures["bytes"] <= _HASHED_BYTES:
        with path.open("rb") as file:
            measures["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return measures

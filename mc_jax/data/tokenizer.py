"""Tokenizers: bytes, and byte-level BPE trained on the corpus. Every text round-trips exactly.

Both share one numbering: ids 0..255 are the bytes, 256 is the separator that begins and ends every
document, 257 and up are BPE merges in the order in which they were learned. The separator is no text: no
text encodes to it. A BPE with no merges is the byte tokenizer.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
from etils import epath

from mc_jax.data.files import read_json, write_json

SEPARATOR_ID = 256
_KIND, _VERSION = "tokenizer", 1
_CURE = "give a tokenizer.json that mc_jax wrote (a run and a prepared folder have one)"
_PIECE_CHARACTERS = 1 << 13  # small enough for caches, large enough to spread over cores


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    kind: Literal["bytes", "bpe"]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator's included."""
        ...

    @property
    def separator_id(self) -> int:
        """The id that begins and ends every document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the tokenizer does: equal for two that encode alike."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 that each id stands for, no two alike; empty of the separator."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, int64 [vocab_size]; 0 of the separator."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, int32 [tokens], without separators."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; separators are skipped, bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        ...

    def bytes_of(self, ids: Iterable[int]) -> np.ndarray:
        """The UTF-8 bytes that each of `ids` stands for, int64 [tokens]; 0 of a separator."""
        ...

    def save(self, path: epath.PathLike) -> None:
        """Write one JSON file that `load_tokenizer` reads."""
        ...

    def library_model(self) -> tokenizers.Tokenizer:
        """The same as the library tokenizers has it, without the separator."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8; vocabulary 257."""

    kind: Literal["bytes", "bpe"] = "bytes"
    separator_id = SEPARATOR_ID

    def __init__(self):
        self._merges: list[tuple[int, int]] = []
        self._token_bytes: list[bytes] = [bytes([byte]) for byte in range(256)] + [b""]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator's included."""
        return len(self._token_bytes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the tokenizer does: equal for two that encode alike."""
        return _fingerprint(self._description())

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The UTF-8 that each id stands for, no two alike; empty of the separator."""
        return tuple(self._token_bytes)

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, int64 [vocab_size]; 0 of the separator."""
        return np.array([len(token) for token in self._token_bytes], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, int32 [tokens], without separators."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; separators are skipped, bytes that are no UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        ids = np.asarray(list(ids), np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids {ids.min()} to {ids.max()} do not fit a vocabulary of {self.vocab_size}; "
                "decode with the tokenizer that the model was trained with"
            )
        return b"".join(self._token_bytes[token] for token in ids).decode(errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> np.ndarray:
        """The UTF-8 bytes that each of `ids` stands for, int64 [tokens]; 0 of a separator."""
        return np.array([len(self._token_bytes[token]) for token in ids], np.int64)

    def save(self, path: epath.PathLike) -> None:
        """Write one JSON file that `load_tokenizer` reads."""
        write_json(path, self._description() | {"fingerprint": self.fingerprint}, indent=None)

    def library_model(self) -> tokenizers.Tokenizer:
        """The same as the library tokenizers has it, without the separator."""
        return BpeTokenizer(self._merges).library_model()

    def _description(self) -> dict[str, Any]:
        return {"kind": _KIND, "version": _VERSION, "tokenizer": self.kind, "merges": self._merges}


class BpeTokenizer(ByteTokenizer):
    """Byte-level BPE with GPT-2's split into words; vocabulary 257 + distinct merges.

    Args:
      merges: pairs of ids, in the order in which they are applied; the n-th new token is id 257 + n.
    """

    kind: Literal["bytes", "bpe"] = "bpe"

    def __init__(self, merges: Iterable[Sequence[int]]):
        super().__init__()
        characters = _byte_characters()
        names = [characters[byte] for byte in range(256)] + [""]
        ids = {name: token for token, name in enumerate(names) if name}
        for left, right in merges:
            self._merges.append((left, right))
            merged = names[left] + names[right]
            if merged not in ids:  # two pairs may make one token: (ab, c) and (a, bc)
                ids[merged] = len(names)
                names.append(merged)
                self._token_bytes.append(self._token_bytes[left] + self._token_bytes[right])
        self._model = _byte_level(
            tokenizers.models.BPE(ids, [(names[left], names[right]) for left, right in self._merges])
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, on all cores."""
        pieces = [list(cut_text(text)) for text in texts]
        encoded = self._model.encode_batch_fast(list(itertools.chain(*pieces)), add_special_tokens=False)
        encodings = iter(encoded)
        empty = np.zeros(0, np.int32)
        return [
            np.concatenate([empty, *(np.asarray(next(encodings).ids, np.int32) for _ in cut)])
            for cut in pieces
        ]

    def library_model(self) -> tokenizers.Tokenizer:
        """The same as the library tokenizers has it, without the separator."""
        return self._model


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Learn a BPE of `vocab_size` ids from `texts`; the same texts always give the same tokenizer.

    Raises:
      ValueError: `vocab_size` is below 258, or the texts have too few distinct pairs for it.
    """
    if vocab_size <= SEPARATOR_ID + 1:
        raise ValueError(f"vocab_size {vocab_size} leaves a BPE no merges; set it to 258 or more")
    model = _byte_level(tokenizers.models.BPE())
    model.train_from_iterator(
        itertools.chain.from_iterable(cut_text(text) for text in texts),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # the separator is not in it
            min_frequency=2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if model.get_vocab_size() < vocab_size - 1:
        raise ValueError(
            f"the text has too few repeated pairs for vocab_size {vocab_size}; "
            f"set vocab_size to {model.get_vocab_size() + 1} or less, or give more text"
        )
    return BpeTokenizer(_merge_ids(json.loads(model.to_str())["model"]["merges"]))


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Read a tokenizer that `save` wrote.

    Raises:
      ValueError: the file is missing, damaged, or not a tokenizer; one line with path and cure.
    """
    fields = ("tokenizer", "merges", "fingerprint")
    values = read_json(path, kind=_KIND, version=_VERSION, fields=fields, cure=_CURE)
    fingerprint = values.pop("fingerprint")
    if fingerprint != _fingerprint(values):
        raise ValueError(f"the tokenizer at {path} is damaged: it does not fit its own fingerprint; {_CURE}")
    return ByteTokenizer() if values["tokenizer"] == "bytes" else BpeTokenizer(values["merges"])


def write_transformers_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as transformers' AutoTokenizer reads it from a folder; it knows no separator.

    Args:
      tokenizer: as of this module.
      folder: which is there.
    """
    model = tokenizer.library_model()
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def cut_text(text: str, length: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of about `length` characters that encode, one by one, as the whole does.

    A word of GPT-2's split may begin with white space but never goes on with it, so a cut between the end
    of a word and white space changes no token; nor does one between a letter and a digit or a mark, which are
    in no word together. Where there is neither for 8,192 characters, the word is cut: to learn merges takes
    a time that is quadratic in the length of a word.
    """
    return cut_stream([text], length)


def cut_stream(chunks: Iterable[str], length: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text that comes in chunks into the pieces that `cut_text` cuts the whole into."""
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        while len(text) - start > length + _LONGEST_WORD:
            end = _place_to_cut(text, start + length)
            yield text[start:end]
            start = end
    while start < len(text):
        end = _place_to_cut(text, start + length) if len(text) - start > length else len(text)
        yield text[start:end]
        start = end


def _place_to_cut(text: str, begin: int) -> int:
    """The first good place from `begin` on, the end of the text, or where a word is too long."""
    end = begin + _LONGEST_WORD
    for places in (_BEFORE_SPACE, _BETWEEN_CLASSES):
        if found := places.search(text, begin, end + 1):  # the character after a cut is looked at
            return found.start()
    return min(end, len(text))


_LONGEST_WORD = 1 << 13
_BEFORE_SPACE = re.compile(r"(?<=[A-Za-z0-9.,;:!?])(?=[ \n])")
# Letters are those of ASCII, kana, Chinese and hangul. The apostrophe is no mark here: it begins words ('s).
_LETTER, _MARK = "A-Za-zぁ-ゖァ-ヺ一-龥가-힣", "!-&(-/:-@[-`{-~、-〃「-』（），．：；！？"
_BETWEEN_CLASSES = re.compile(
    rf"(?<=\S)(?=[ \t\r\n])|(?<=[{_LETTER}])(?=[0-9{_MARK}])|(?<=[0-9])(?=[{_LETTER}{_MARK}])"
)


def _fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _byte_level(bpe: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(bpe)
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return model


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others follow from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    return {byte: stand_ins.get(byte, chr(byte)) for byte in range(256)}


def _merge_ids(merges: Iterable[Sequence[str]]) -> Iterator[tuple[int, int]]:
    ids = {character: byte for byte, character in _byte_characters().items()}
    for left, right in merges:
        yield ids[left], ids[right]
        ids.setdefault(left + right, len(ids) + 1)  # + 1: the separator has an id but no name

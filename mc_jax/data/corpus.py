"""Corpora that come with the package, so that the first run needs no download."""

import dataclasses
import gzip
import hashlib
import importlib.resources

from mc_jax.data import pairs
from mc_jax.data.documents import Document

_AUSTEN_TRAIN = {
    "emma": "dd08b340a56ad4a0a00718d5682528a5a5886ae0aef91c9e0fa528074fa64b75",
    "mansfield_park": "e0e9ef3863ea77f51f6070062ee0dd50ad9b933223880617629e4e4963ea40ff",
    "northanger_abbey": "8618a5acf5be50cc6e9b7680c7469fb6012649ab08c709dfc63c6367989fd31d",
    "pride_and_prejudice": "2e44edaa4946d64ad541c68e0224f5d672f43bf3ce2a8a0b0637ad5e02fc6eb3",
    "sense_and_sensibility": "0996d90842bbe8093f3b8142c1e77d1b20cff52d1d0615f3ed67733653e74e26",
}
_AUSTEN_HELD_OUT = {"persuasion": "726513a6c18bb678427bcbcf7c72d0d20816a67c25b0471b26ddcabf3ebac140"}

CORPORA = ("austen", "pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Whole texts, split once and for all."""

    train: list[Document]
    """What a model may see."""
    held_out: list[Document]
    """What it is scored on."""


def load_corpus(name: str) -> Corpus:
    """Read or make an embedded corpus.

    "austen" is Jane Austen's novels, five for training and Persuasion held out; "pairs" is made of names and
    words, to learn recall from (`mc_jax.data.pairs`).

    Raises:
      ValueError: there is no such corpus, or its files are not the ones that were published.
    """
    if name not in CORPORA:
        raise ValueError(f"there is no embedded corpus {name!r}; known are {', '.join(CORPORA)}")
    if name == "pairs":
        return Corpus(train=pairs.training_documents(), held_out=pairs.held_out_documents())
    return Corpus(
        train=[_read(title, digest) for title, digest in _AUSTEN_TRAIN.items()],
        held_out=[_read(title, digest) for title, digest in _AUSTEN_HELD_OUT.items()],
    )


def _read(title: str, digest: str) -> Document:
    file = importlib.resources.files("mc_jax.data") / "austen" / f"{title}.txt.gz"
    cure = "install mc-jax again"
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {cure}") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{file} does not have the SHA-256 it was published with; {cure}")
    return Document(title, content.decode())

"""Text files to a prepared folder: a tokenizer and token stores that training maps into memory.

The folder: tokenizer.json, train/, held_out/ (if there is any), manifest.json, summary.json.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mc_jax.data._readers import Reading
from mc_jax.data.dataset import (
    HELD_OUT,
    KIND,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TRAIN,
    VERSION,
    Dataset,
    open_prepared,
)
from mc_jax.data.documents import Document, tokenize_labelled
from mc_jax.data.files import new_folder, write_json
from mc_jax.data.selection import Progress, Selection, select
from mc_jax.data.sources import find_sources, must_differ
from mc_jax.data.split import Share
from mc_jax.data.store import must_be_free, store_writer
from mc_jax.data.summary import SUMMARY_FILE, Tally, summary
from mc_jax.data.tokenizer import ByteTokenizer, Tokenizer, cut_text, load_tokenizer, train_bpe

_SAMPLE_CHARACTERS = 64 << 20  # what a BPE is trained on at most


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    held_out: Sequence[str | Path] | Share = (),
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    reading: Reading | None = None,
    told: Progress | None = None,
) -> Dataset:
    """Tokenize text files into a folder that `data.corpus` can name.

    Files are read as streams, twice or more often: some megabytes are in memory at a time, neither the corpus
    nor a whole text file. Empty documents are left out.

    Args:
      inputs: training text, as `find_sources` takes it: files, folders, patterns, standard input.
      output: the folder; must not exist, or be empty. It is there whole or not at all.
      held_out: files to be scored, not trained on; or the share of `inputs` that is split off for it.
      tokenizer: "bpe" (trained on an even sample of `inputs`), "bytes", or a tokenizer.json of mc_jax.
      vocab_size: ids of the "bpe" tokenizer; None otherwise.
      reading: how files are read, and which documents count; None: as `Reading` has it.
      told: is told how much is done.

    Returns:
      The opened folder.

    Raises:
      ValueError: settings or files that do not fit; one line with the cure.
    """
    reading = Reading() if reading is None else reading
    folder = Path(output).expanduser().resolve()
    must_be_free(folder)
    if not inputs:
        raise ValueError("there is nothing to prepare; give at least one file")
    given = None if tokenizer == "bpe" else _given_tokenizer(tokenizer, vocab_size)
    if given is None and vocab_size is None:
        raise ValueError("tokenizer 'bpe' has no size; set vocab_size, for example to 4096")
    share = held_out if isinstance(held_out, Share) else None
    scored = [] if isinstance(held_out, Share) else find_sources(held_out, format=reading.format)
    training = find_sources(inputs, format=reading.format, without=scored)
    must_differ([*training, *scored])
    selection = select({TRAIN: training, HELD_OUT: scored}, reading, share=share, told=told)
    if given is None:
        assert vocab_size is not None
        given = train_bpe(_sample(selection.training, selection.characters), vocab_size)
    with new_folder(folder) as partial:
        given.save(partial / TOKENIZER_FILE)
        tallies = _write(partial, selection, given, told)
        splits = {}
        for part, tally in tallies.items():
            files = training if part == TRAIN or share is not None else scored
            splits[part] = {"files": [Path(source.place).name for source in files]} | tally.totals()
        write_json(partial / SUMMARY_FILE, summary(selection, tallies))
        manifest = {"fingerprint": given.fingerprint, "splits": splits}
        write_json(partial / MANIFEST_FILE, {"kind": KIND, "version": VERSION} | manifest)
    return open_prepared(folder)


def _write(
    folder: Path, selection: Selection, tokenizer: Tokenizer, told: Progress | None
) -> dict[str, Tally]:
    """Tokenize what was selected into a store a part."""
    tallies = {part: Tally() for part in selection.parts}
    documents = selection.documents(told, "tokenizing")
    with contextlib.ExitStack() as stack:
        add = {part: stack.enter_context(store_writer(folder / part, tokenizer)) for part in tallies}
        for part, document in tokenize_labelled(documents, tokenizer):
            add[part](document)
            tallies[part].add(document)
    return tallies


def _given_tokenizer(tokenizer: str | Path, vocab_size: int | None) -> Tokenizer:
    if vocab_size is not None:
        raise ValueError(
            f"vocab_size {vocab_size} has no effect with tokenizer {str(tokenizer)!r}; "
            "leave it out, or set tokenizer to 'bpe'"
        )
    return ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(Path(tokenizer))


def _sample(
    read: Callable[[], Iterable[Document]], characters: int, most: int = _SAMPLE_CHARACTERS
) -> Iterator[str]:
    """Every n-th piece of the text, n the least power of two for which they have at most `most` characters.

    Args:
      read: begins to read the documents.
      characters: that they have, or somewhat more.
      most: characters of the sample.
    """

    def pieces() -> Iterator[str]:
        return (piece for document in read() for piece in cut_text(document.text))

    every = 1
    if characters > most:
        sizes = [0] * 64  # by the largest power of two that divides a piece's number
        for number, piece in enumerate(pieces()):
            sizes[(number & -number).bit_length() - 1 if number else -1] += len(piece)
        while sum(sizes[every.bit_length() - 1 :]) > most:
            every *= 2
    return itertools.islice(pieces(), 0, None, every)

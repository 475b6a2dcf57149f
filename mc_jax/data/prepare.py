"""Text files to a prepared folder: a tokenizer and token stores that training maps into memory.

The folder: tokenizer.json, train/, held_out/ (if there is any), manifest.json.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mc_jax.data._readers import check_readable, read_documents
from mc_jax.data.conversations import ChatTemplate
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
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.files import new_folder, write_json
from mc_jax.data.split import split_off
from mc_jax.data.store import must_be_free, write_store
from mc_jax.data.tokenizer import ByteTokenizer, Tokenizer, cut_text, load_tokenizer, train_bpe

_SAMPLE_CHARACTERS = 64 << 20  # what a BPE is trained on at most


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    held_out: Sequence[str | Path] | float = (),
    tokenizer: str | Path = "bpe",
    vocab_size: int | None = None,
    text_field: str = "text",
    template: ChatTemplate | None = None,
) -> Dataset:
    """Tokenize text files into a folder that `data.corpus` can name.

    Files are read as streams: one document (and a sample of at most 64 million characters for the BPE) is
    in memory at a time, not the corpus. Empty documents are left out.

    Args:
      inputs: training text: .txt (one document a file), .jsonl (one a line), either also with .gz, and
        .parquet (one a row).
      output: the folder; must not exist, or be empty. It is there whole or not at all.
      held_out: files to be scored, not trained on; or the share of `inputs` that is split off for it.
      tokenizer: "bpe" (trained on an even sample of `inputs`), "bytes", or a tokenizer.json of mc_jax.
      vocab_size: ids of the "bpe" tokenizer; None otherwise.
      text_field: field of .jsonl or column of .parquet that has the text.
      template: what makes a text of the conversation that a line or row has, of which the responses alone
        are learned and scored; None: lines and rows have texts.

    Returns:
      The opened folder.

    Raises:
      ValueError: settings or files that do not fit; one line with the cure.
    """
    content = text_field if template is None else template
    training = [Path(path) for path in inputs]
    scored = [] if isinstance(held_out, float) else [Path(path) for path in held_out]
    folder = Path(output).expanduser().resolve()
    must_be_free(folder)
    if not training:
        raise ValueError("there is nothing to prepare; give at least one file")
    for path in training + scored:
        check_readable(path)
    _must_differ(training, scored)
    if isinstance(held_out, float):
        split = split_off(_read(training, content), held_out)
        parts = {TRAIN: (training, split.train), HELD_OUT: (training, split.held_out)}
    else:
        parts = {TRAIN: (training, iter), HELD_OUT: (scored, iter)}

    def documents(part: str) -> Iterator[Document]:
        paths, choose = parts[part]
        return choose(_read(paths, content))

    used_tokenizer = _choose_tokenizer(tokenizer, vocab_size, documents(TRAIN))
    with new_folder(folder) as partial:
        used_tokenizer.save(partial / TOKENIZER_FILE)
        splits = {}
        for part, (paths, _) in parts.items():
            if not paths:
                continue
            store = write_store(partial / part, tokenize(documents(part), used_tokenizer), used_tokenizer)
            splits[part] = {
                "files": [path.name for path in paths],
                "documents": len(store),
                "tokens": store.num_tokens,
                "text_bytes": store.num_bytes,
            }
        manifest = {"fingerprint": used_tokenizer.fingerprint, "splits": splits}
        write_json(partial / MANIFEST_FILE, {"kind": KIND, "version": VERSION} | manifest)
    return open_prepared(folder)


def _read(paths: Iterable[Path], content: str | ChatTemplate) -> Iterator[Document]:
    for path in paths:
        yield from read_documents(path, content)


def _must_differ(training: list[Path], scored: list[Path]) -> None:
    seen: set[Path] = set()
    for path in training + scored:
        if path.resolve() in seen:
            raise ValueError(
                f"{path} is given twice; give each file once, for training or for held_out, "
                "or the result is measured on text that was trained on"
            )
        seen.add(path.resolve())


def _choose_tokenizer(
    tokenizer: str | Path, vocab_size: int | None, documents: Iterable[Document]
) -> Tokenizer:
    if tokenizer == "bpe":
        if vocab_size is None:
            raise ValueError("tokenizer 'bpe' has no size; set vocab_size, for example to 4096")
        return train_bpe(_sample(documents), vocab_size)
    if vocab_size is not None:
        raise ValueError(
            f"vocab_size {vocab_size} has no effect with tokenizer {str(tokenizer)!r}; "
            "leave it out, or set tokenizer to 'bpe'"
        )
    return ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(Path(tokenizer))


def _sample(documents: Iterable[Document], characters: int = _SAMPLE_CHARACTERS) -> list[str]:
    """Every n-th piece of the text, n the least power of two for which they have at most `characters`."""
    pieces = (piece for document in documents for piece in cut_text(document.text))
    sample, size, every = [], 0, 1
    for number, piece in enumerate(pieces):
        if number % every:
            continue
        sample.append(piece)
        size += len(piece)
        while size > characters and len(sample) > 1:
            sample, every = sample[::2], 2 * every
            size = sum(len(piece) for piece in sample)
    return sample

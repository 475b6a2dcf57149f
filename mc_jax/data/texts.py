"""Text files as a store in memory, for a model that is to be scored on them."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from mc_jax.data._readers import check_readable, read_documents
from mc_jax.data.documents import tokenize
from mc_jax.data.store import TokenStore, memory_store
from mc_jax.data.tokenizer import Tokenizer


def text_store(files: Sequence[Path], tokenizer: Tokenizer, *, text_field: str = "text") -> TokenStore:
    """Tokenize files: .txt (a document each), .jsonl (one a line), both also with .gz, .parquet (one a row).

    Args:
      files: at least one.
      tokenizer: the model's.
      text_field: field of .jsonl, or column of .parquet, that has the text.

    Raises:
      ValueError: a file that is not there, damaged, or of no known format, or no text in any.
    """
    for file in files:
        check_readable(file)
    documents = itertools.chain.from_iterable(read_documents(file, text_field) for file in files)
    return memory_store(tokenize(documents, tokenizer), tokenizer)

"""Text files as a store in memory, for a model that is to be scored on them."""

from collections.abc import Sequence
from pathlib import Path

from mc_jax.data._readers import Reading, read_strictly
from mc_jax.data.documents import tokenize
from mc_jax.data.sources import find_sources
from mc_jax.data.store import TokenStore, memory_store
from mc_jax.data.tokenizer import Tokenizer


def text_store(files: Sequence[Path], tokenizer: Tokenizer, *, text_field: str = "text") -> TokenStore:
    """Tokenize files: .txt and .md (a document each), .jsonl (a line), .json (a value), .parquet (a row).

    Args:
      files: at least one; folders and patterns too.
      tokenizer: the model's.
      text_field: field of JSON, or column of .parquet, that has the text.

    Raises:
      ValueError: a file that is not there, damaged, or of no known format, or no text in any.
    """
    documents = read_strictly(find_sources(files), Reading(text_field=text_field))
    return memory_store(tokenize(documents, tokenizer), tokenizer)

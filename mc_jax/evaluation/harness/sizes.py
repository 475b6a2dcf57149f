"""Sizes that rows are filled up to: few, so that few programs are compiled."""

from collections.abc import Callable, Iterable


def filled_size(tokens: int, *, segment_length: int, most: int) -> int:
    """The tokens of the row that so many are laid into.

    A power of two of segments, or what the longest row takes: at most half of a row is filling.

    Args:
      tokens: at least 1, at most `most`.
      segment_length: tokens; rows are whole segments.
      most: tokens that no row exceeds.
    """
    assert 1 <= tokens <= most
    segments = 1 << (-(-tokens // segment_length) - 1).bit_length()
    return min(segments, -(-most // segment_length)) * segment_length


def grouped[T](items: Iterable[T], key: Callable[[T], int]) -> list[tuple[int, list[T]]]:
    """Items by a key, the largest key first: what does not fit into memory is told at once."""
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return sorted(groups.items(), key=lambda entry: entry[0], reverse=True)

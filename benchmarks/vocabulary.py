"""A made-up WordPiece vocabulary, so that random token ids can also be written as text."""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path

VOCABULARY_FILE = "vocab.txt"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".")
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def words(size: int) -> list[str]:
    """``size`` vocabulary entries: the special tokens, a full stop, and pronounceable whole words."""
    made = ("".join(parts) for length in (1, 2, 3) for parts in product(SYLLABLES, repeat=length))
    return [*SPECIALS, *islice(made, size - len(SPECIALS))]


def write(size: int, folder: Path) -> None:
    """Write the vocabulary as ``vocab.txt``, one entry a line."""
    (folder / VOCABULARY_FILE).write_text("".join(f"{word}\n" for word in words(size)), encoding="utf-8")

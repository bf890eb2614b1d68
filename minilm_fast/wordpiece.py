"""BERT's tokenisation: clean, lower-case, split on spaces, punctuation and ideographs, then WordPiece.

The rules are those of Google's BERT (Devlin et al., 2019) as transformers 2.10 applies them, to the letter, so
that a checkpoint sees the ids it was trained with. Everything after the split on spaces depends on one word only
and is cached per word, which makes this as fast as a compiled tokenizer on running text.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Collection, Mapping
from typing import NamedTuple

MAX_WORD_LENGTH = 100
_CACHED_WORDS = 1 << 16

_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class WordPiece:
    """Splits text into WordPiece tokens.

    Args:
        vocabulary: token -> id.
        unk_token: stands for a word that cannot be composed of pieces.
        do_lower_case: lower-case the text and strip its accents.
        never_split: tokens that are left whole where they stand between spaces.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], unk_token: str, do_lower_case: bool, never_split: Collection[str]
    ) -> None:
        self._vocabulary = vocabulary
        self._unk_token = unk_token
        self._do_lower_case = do_lower_case
        self._never_split = frozenset(never_split)
        self._clean = _CleaningTable()
        self._word = functools.lru_cache(maxsize=_CACHED_WORDS)(self._tokenize_word)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, which is already in lower case if that is wanted."""
        word = self._word
        return [token for part in text.translate(self._clean).split() for token in word(part)]

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The tokens of a text, and the characters of the text that each stands for: ``start, end``, end exclusive."""
        tokens: list[str] = []
        offsets: list[tuple[int, int]] = []
        cleaned = [(char, place) for place, source in enumerate(text) for char in source.translate(self._clean)]
        for part in _split_spaces(cleaned):
            chars = [_Character(char, place, place + 1) for char, place in part]
            word = "".join(char for char, _ in part)
            tokens += self._word(word)
            offsets += self._offsets(word, chars)
        return tokens, offsets

    def _offsets(self, word: str, chars: list[_Character]) -> list[tuple[int, int]]:
        whole = (chars[0].start, chars[-1].end)
        if word in self._never_split:
            return _cut(self._pieces(word), chars, self._unk_token)
        if self._do_lower_case:
            chars = _without_accents(chars)
        parts = " ".join(_split_punctuation("".join(char.text for char in chars))).split()
        pieces = [self._pieces(part) for part in parts]
        if tuple(piece for group in pieces for piece in group) != self._word(word):
            # Accents put in another order by normalisation: which token has which character is not told apart.
            return [whole] * len(self._word(word))
        chars = [char for char in chars if not char.text.isspace()]
        offsets: list[tuple[int, int]] = []
        for part, group in zip(parts, pieces, strict=True):
            offsets += _cut(group, chars[: len(part)], self._unk_token)
            chars = chars[len(part) :]
        return offsets

    def _tokenize_word(self, word: str) -> tuple[str, ...]:
        if word in self._never_split:
            return tuple(self._pieces(word))
        if self._do_lower_case:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(char for char in decomposed if unicodedata.category(char) != "Mn")
        # Decomposition can bring up white space again, and a second split finds it.
        parts = " ".join(_split_punctuation(word)).split()
        return tuple(piece for part in parts for piece in self._pieces(part))

    def _pieces(self, word: str) -> list[str]:
        """The longest vocabulary entry that starts the word, then likewise for the rest."""
        if len(word) > MAX_WORD_LENGTH:
            return [self._unk_token]
        pieces = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                piece = prefix + word[start:end]
                if piece in self._vocabulary:
                    break
            else:
                return [self._unk_token]
            pieces.append(piece)
            start = end
        return pieces


class _Character(NamedTuple):
    """A character after normalisation, and where in the text it comes from."""

    text: str
    start: int
    end: int


def _split_spaces(cleaned: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    groups = itertools.groupby(cleaned, key=lambda item: item[0].isspace())
    return [list(group) for is_space, group in groups if not is_space]


def _without_accents(chars: list[_Character]) -> list[_Character]:
    """Decomposed, lower-case characters; a base letter takes the place of the accents after it, too."""
    found: list[_Character] = []
    for char in chars:
        decomposed = unicodedata.normalize("NFD", char.text.lower())
        kept = [part for part in decomposed if unicodedata.category(part) != "Mn"]
        if not kept and found:
            found[-1] = found[-1]._replace(end=char.end)
        found += [_Character(part, char.start, char.end) for part in kept]
    return found


def _cut(pieces: list[str], chars: list[_Character], unk_token: str) -> list[tuple[int, int]]:
    """Offsets of the pieces that a word's characters were cut into."""
    if pieces == [unk_token]:
        return [(chars[0].start, chars[-1].end)]
    offsets = []
    start = 0
    for piece in pieces:
        end = start + len(piece) - (2 if start else 0)
        offsets.append((chars[start].start, chars[end - 1].end))
        start = end
    return offsets


class _CleaningTable(dict[int, str]):
    """Translation table, filled as characters turn up: drops control characters, sets ideographs apart."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            value = " "
        elif code in (0, 0xFFFD) or category.startswith("C"):
            value = ""
        elif any(first <= code <= last for first, last in _IDEOGRAPHS):
            value = f" {char} "
        else:
            value = char
        self[code] = value
        return value


def is_punctuation(char: str) -> bool:
    """ASCII symbols that are neither letters nor digits, and Unicode's punctuation."""
    code = ord(char)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(char).startswith("P")


def _split_punctuation(word: str) -> list[str]:
    parts: list[str] = []
    inside = False
    for char in word:
        if is_punctuation(char):
            parts.append(char)
            inside = False
        elif inside:
            parts[-1] += char
        else:
            parts.append(char)
            inside = True
    return parts

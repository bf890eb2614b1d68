"""Bringing texts into the tokenisation that an official scoring script compares.

The rules are those of the scripts of UniLM and s2s-ft (``fix_tokenization`` and what stands around it), whose quirks
belong to the published numbers.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from minilm_fast.wordpiece import WordPiece

# Sentence breaks: the first is in decoded text, the second in gold files of CNN / Daily Mail.
PREDICTED_BREAK, GOLD_BREAK = "[X_SEP]", "<S_SEP>"
# Shorter sentences of a CNN / Daily Mail summary are dropped.
_SHORTEST_SENTENCE = 5
_UNKNOWN = "[UNK]"
_BRACKETS = {"(": "LRB", ")": "RRB", "[": "LSB", "]": "RSB", "{": "LCB", "}": "RCB"}
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", _UNKNOWN: "UNK"}
_LOWER_BRACKETS = {char: f"-{name.lower()}-" for char, name in _BRACKETS.items()}


@dataclass(frozen=True)
class Style:
    """What ``fix_tokenization`` does in one script.

    Attributes:
        symbols: tokens that are written otherwise.
        quotes: whether quotation marks become opening and closing ones, in turn.
        dashes: whether the parts of a hyphenated word are joined.
        escapes: characters that are written otherwise anywhere in the result, spaces around them.
    """

    symbols: Mapping[str, str] = field(default_factory=dict)
    quotes: bool = False
    dashes: bool = False
    escapes: Mapping[str, str] = field(default_factory=dict)


XSUM = Style(escapes={char: f"-{_BRACKETS[char]}-" for char in "()"})
CNNDM = Style(
    symbols={char: f"-{name}-" for char, name in _BRACKETS.items()},
    quotes=True,
    dashes=True,
    escapes={char: f"-{_BRACKETS[char]}-" for char in "()[]"},
)
NQG = Style(symbols={**_LOWER_BRACKETS, **_ESCAPES}, quotes=True, dashes=True)
GIGAWORD = Style(symbols={**NQG.symbols, "<unk>": "UNK"}, quotes=True, dashes=True)


def join_wordpieces(tokens: Iterable[str]) -> str:
    """Words with spaces between them, from WordPiece tokens (``##`` continues a word)."""
    words: list[str] = []
    for token in tokens:
        if token.startswith("##") and words:
            words[-1] += token[2:]
        else:
            words.append(token)
    return " ".join(words)


def fix_tokenization(text: str, style: Style) -> str:
    """BERT's words, split at every mark, in the tokenisation of the Penn Treebank as far as the scripts restore it.

    ``don ' t`` becomes ``do n't``, ``3 . 5`` becomes ``3.5``, and what ``style`` asks for.
    """
    return _escape(" ".join(_Joiner(text.split(), style).run()), style)


class _Joiner:
    """Goes through the tokens; a rule adds to ``out`` and says how many tokens it used, or 0 if it does not apply."""

    def __init__(self, tokens: Sequence[str], style: Style) -> None:
        self.tokens, self.style = tokens, style
        self.out: list[str] = []
        self.place = 0
        self.opened: set[str] = set()
        self.after_dash = False

    def run(self) -> list[str]:
        rules = [self._symbol, self._contraction, self._ellipsis, self._number, self._initials]
        if self.style.quotes:
            rules.insert(2, self._quote)
        if self.style.dashes:
            rules.append(self._dash)
        while self.place < len(self.tokens):
            joins, self.after_dash = self.after_dash, False
            token = self.tokens[self.place]
            used = next((used for rule in rules if (used := rule(token))), 0)
            if not used and joins and token[0] not in string.punctuation:
                self.out[-1] += token
            elif not used:
                self.out.append(token)
            self.place += used or 1
        return self.out

    def _ahead(self, distance: int) -> str:
        place = self.place + distance
        return self.tokens[place] if place < len(self.tokens) else ""

    @property
    def _last(self) -> str:
        return self.out[-1] if self.out else ""

    def _symbol(self, token: str) -> int:
        if token not in self.style.symbols:
            return 0
        self.out.append(self.style.symbols[token])
        return 1

    def _contraction(self, token: str) -> int:
        following = self._ahead(1)
        if token == "'" and following == "t" and self._last.endswith("n"):
            self.out[-1] = self.out[-1][:-1]
            self.out.append("n't")
            return 2
        if token == "'" and following in ("s", "d", "ll"):
            self.out.append(token + following)
            return 2
        return 0

    def _quote(self, token: str) -> int:
        if token not in ("'", '"'):
            return 0
        closed, opened = ("''", "``") if token == '"' else ("'", "`")
        self.out.append(closed if token in self.opened else opened)
        self.opened ^= {token}
        return 1

    def _ellipsis(self, token: str) -> int:
        if not token == self._ahead(1) == self._ahead(2) == ".":
            return 0
        self.out.append("...")
        return 3

    def _number(self, token: str) -> int:
        last, following = self._last, self._ahead(1)
        grouped = token == "," and _is_grouped(last) and _is_grouped(following)
        decimal = token == "." and last.isdigit() and following.isdigit()
        if not (grouped or decimal):
            return 0
        self.out[-1] += token + following
        return 2

    def _initials(self, token: str) -> int:
        """``U . N .`` becomes ``U.N. .`` and ``U . S . A .`` ``U.S. . A .``: so the scripts count their tokens."""
        if not (token == "." == self._ahead(2) and _is_initial(self._last) and _is_initial(self._ahead(1))):
            return 0
        end = 3
        while _is_initial(self._ahead(end + 1)) and self._ahead(end + 2) == ".":
            end += 2
        self.out[-1] += "".join(self.tokens[self.place : self.place + end])
        return 2

    def _dash(self, token: str) -> int:
        if token != "-":
            return 0
        following = self._ahead(1)
        if following == "-":
            self.out.append("--")
            return 2
        if self.place == 0 or not following or self._last in string.punctuation or following[0] in string.punctuation:
            self.out.append("-")
        else:
            self.out[-1] += "-"
            self.after_dash = True
        return 1


def _is_grouped(token: str) -> bool:
    return bool(token) and all(char.isdigit() or char == "," for char in token)


def _is_initial(token: str) -> bool:
    return len(token) == 1 and token.isupper()


def one_sentence(text: str, style: Style, trunc_len: int = 0) -> str:
    """A predicted headline or one-sentence summary (XSum, Gigaword), cut to ``trunc_len`` words unless that is 0."""
    fixed = fix_tokenization(text, style)
    if style is GIGAWORD:
        fixed = fixed.replace("1", "#")
    return "\n".join(_truncate([fixed], trunc_len))


def sentences(text: str, trunc_len: int, duplicate_rate: float) -> str:
    """A predicted CNN / Daily Mail summary, one sentence a line.

    Args:
        text: sentences with ``[X_SEP]`` between them. Those of fewer than 5 words are dropped.
        trunc_len: words that are kept; 0 keeps all.
        duplicate_rate: a sentence is dropped if more than this share of its distinct words occurs in earlier ones;
            0, or 1 and more, keeps all.
    """
    found = [fix_tokenization(sentence, CNNDM) for sentence in text.split(PREDICTED_BREAK)]
    found = [sentence for sentence in found if len(sentence.split()) >= _SHORTEST_SENTENCE]
    if 0 < duplicate_rate < 1:
        found = _without_repetitions(found, duplicate_rate)
    return "\n".join(_truncate(found, trunc_len))


def _without_repetitions(found: Sequence[str], duplicate_rate: float) -> list[str]:
    kept: list[str] = []
    seen: set[str] = set()
    for sentence in found:
        words = set(sentence.lower().split())
        if len(words & seen) / len(words) <= duplicate_rate:
            kept.append(sentence)
        seen |= words
    return kept


def _truncate(found: Sequence[str], trunc_len: int) -> list[str]:
    if not trunc_len:
        return list(found)
    kept: list[str] = []
    left = trunc_len
    for sentence in found:
        words = sentence.split()[:left]
        kept.append(" ".join(words))
        left -= len(words)
        if left <= 0:
            break
    return kept


def gold_sentences(text: str) -> str:
    """A reference summary, one sentence a line; ``<S_SEP>`` and ``[X_SEP]`` are sentence breaks."""
    for mark in (GOLD_BREAK, PREDICTED_BREAK):
        text = text.replace(mark, "\n")
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def write_brackets(text: str) -> str:
    """Round and square brackets as the official references write them, for references in raw text."""
    return "\n".join(_escape(line, CNNDM) for line in text.split("\n"))


def _escape(text: str, style: Style) -> str:
    for char, written in style.escapes.items():
        text = text.replace(char, f" {written} ")
    return " ".join(text.split())


def nqg_question(text: str) -> str:
    """A predicted question as UniLM's ``qg/eval.py`` compares it with the references of Du et al."""
    return fix_tokenization(text, NQG).lower()


def basic_tokens(text: str) -> str:
    """The text split as BERT's uncased models see it, before WordPiece: lower-cased, no accents, every mark apart."""
    return " ".join(_basic_tokenizer().tokenize(text)).lower()


class _EveryWord(dict[str, int]):
    """A vocabulary that holds every word, so that none is broken into pieces."""

    def __contains__(self, word: object) -> bool:
        return True


@functools.cache
def _basic_tokenizer() -> WordPiece:
    return WordPiece(_EveryWord(), _UNKNOWN, do_lower_case=True, never_split=[_UNKNOWN])

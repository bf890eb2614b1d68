"""From examples to token ids, and where these are kept."""

from __future__ import annotations

import bisect
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilm_fast.data.examples import Example, decode_line, no_examples, parse_example, read_lines
from minilm_fast.data.masking import Feature, SpecialIds
from minilm_fast.data.parallel import ordered_map
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

# Examples are tokenised, sent between processes and stored in chunks of at most so many lines and bytes of text.
_CHUNK_LINES, _CHUNK_BYTES = 2048, 1 << 24
# Text and vocabulary that belong together stay far below this share.
_MANY_UNKNOWN = 0.05

logger = logging.getLogger(__name__)


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids that frame and mask a sample."""
    return SpecialIds(
        cls=tokenizer.cls_id,
        sep=tokenizer.sep_id,
        mask=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
    )


def _token_ids(text: str | list[str], tokenizer: Tokenizer) -> list[int]:
    tokens = tokenizer.tokenize(text) if isinstance(text, str) else text
    return tokenizer.convert_tokens_to_ids(tokens)


def make_features(examples: Iterable[Example], tokenizer: Tokenizer) -> list[Feature]:
    """Token ids of every example, not truncated, without special tokens; lists of tokens are taken as they are."""
    return [Feature(_token_ids(e.source, tokenizer), _token_ids(e.target, tokenizer)) for e in examples]


@dataclass(frozen=True)
class FeatureChunk:
    """Features of neighbouring examples: ids int32 one after the other, and where each example starts.

    Example ``i`` has ``source_ids[source_offsets[i]:source_offsets[i + 1]]``, and so for the target.
    """

    source_ids: np.ndarray
    source_offsets: np.ndarray
    target_ids: np.ndarray
    target_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.source_offsets) - 1


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a file; ``unknown`` of them are not in the vocabulary."""

    tokens: int = 0
    unknown: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.tokens + other.tokens, self.unknown + other.unknown)

    def check(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Warns of many unknown tokens; raises :class:`UserError` if the vocabulary knows no token at all."""
        if self.tokens and self.tokens == self.unknown:
            raise UserError(
                f"{path}: none of the {self.tokens} tokens is in the vocabulary {tokenizer.source}: wrong file?"
            )
        if self.unknown > _MANY_UNKNOWN * self.tokens:
            share = 100 * self.unknown / self.tokens
            logger.warning("%s: %.0f%% of the tokens are not in the vocabulary %s", path, share, tokenizer.source)


class FeatureStore(Sequence[Feature]):
    """Features of a data set, in few large arrays: in memory, or mapped from a cache file.

    ``store[i]`` makes lists of Python integers of one example.

    Attributes:
        counts: tokens of the whole file, and how many of them are unknown.
    """

    def __init__(self, chunks: Sequence[FeatureChunk], counts: TokenCounts, order: np.ndarray | None = None) -> None:
        self.counts = counts
        self._chunks = chunks
        self._starts = [0, *itertools.accumulate(len(chunk) for chunk in chunks)]
        self._order = order

    def __len__(self) -> int:
        return self._starts[-1] if self._order is None else len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"feature {index} of {len(self)}")
        row = index % len(self)
        if self._order is not None:
            row = int(self._order[row])
        at = bisect.bisect_right(self._starts, row) - 1
        return _feature(self._chunks[at], row - self._starts[at])

    def __iter__(self) -> Iterator[Feature]:
        if self._order is not None:
            return super().__iter__()
        return (_feature(chunk, i) for chunk in self._chunks for i in range(len(chunk)))

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of source and target tokens of every feature, int64 each; no feature is decoded."""
        source, target = (
            np.concatenate([np.diff(getattr(chunk, name)) for chunk in self._chunks] or [np.zeros(0)]).astype(np.int64)
            for name in ("source_offsets", "target_offsets")
        )
        return (source, target) if self._order is None else (source[self._order], target[self._order])

    def select(self, indices: Sequence[int] | np.ndarray) -> FeatureStore:
        """View of some of the features in an order of one's own, such as a shuffled one; nothing is copied."""
        order = np.asarray(indices, dtype=np.int64)
        return FeatureStore(self._chunks, self.counts, order if self._order is None else self._order[order])


def _feature(chunk: FeatureChunk, i: int) -> Feature:
    source, target = chunk.source_offsets, chunk.target_offsets
    return Feature(
        chunk.source_ids[source[i] : source[i + 1]].tolist(), chunk.target_ids[target[i] : target[i + 1]].tolist()
    )


class _ChunkBuilder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = array("i"), array("i")
        self.offsets = array("q", [0]), array("q", [0])

    def add(self, example: Example, where: str) -> None:
        for text, ids, offsets in zip((example.source, example.target), self.ids, self.offsets, strict=True):
            ids.extend(_token_ids(text, self.tokenizer))
            offsets.append(len(ids))
        if self.offsets[1][-1] == self.offsets[1][-2]:
            raise UserError(f"{where}: 'tgt' is empty: nothing is left of it after tokenisation")

    def chunk(self) -> tuple[FeatureChunk, TokenCounts]:
        source, target = (np.frombuffer(ids, dtype=np.int32) for ids in self.ids)
        starts = [np.frombuffer(offsets, dtype=np.int64) for offsets in self.offsets]
        unknown = sum(int(np.count_nonzero(ids == self.tokenizer.unk_id)) for ids in (source, target))
        counts = TokenCounts(len(source) + len(target), unknown)
        return FeatureChunk(source, starts[0], target, starts[1]), counts


Lines = list[tuple[int, bytes]]


class _TokeniseLines:
    def __init__(self, path: str, tokenizer: Tokenizer) -> None:
        self.path = path
        self.tokenizer = tokenizer

    def __call__(self, lines: Lines) -> tuple[FeatureChunk, TokenCounts]:
        builder = _ChunkBuilder(self.tokenizer)
        for number, line in lines:
            where = f"{self.path}:{number}"
            builder.add(parse_example(decode_line(line, where), where), where)
        return builder.chunk()


def _chunks_of_lines(path: str | Path) -> Iterator[Lines]:
    lines: Lines = []
    size = 0
    for numbered in read_lines(path):
        lines.append(numbered)
        size += len(numbered[1])
        if len(lines) == _CHUNK_LINES or size >= _CHUNK_BYTES:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def tokenise_file(
    path: str | Path, tokenizer: Tokenizer, num_proc: int = 1
) -> Iterator[tuple[FeatureChunk, TokenCounts]]:
    """Features of a JSON-lines file, chunk by chunk in the order of the file, whatever the number of processes.

    Sources may come out empty. Nothing is truncated.

    Args:
        num_proc: processes that tokenise; with 1 this one does.

    Raises:
        UserError: as :func:`minilm_fast.data.examples.read_examples`, or a target without tokens, or none of the
            file's tokens is in the vocabulary.
    """
    total = TokenCounts()
    found = False
    results = ordered_map(_TokeniseLines(str(path), tokenizer), _chunks_of_lines(path), num_proc, str(path))
    for chunk, counts in results:
        total += counts
        found = True
        yield chunk, counts
    if not found:
        raise no_examples(path)
    total.check(path, tokenizer)


def read_features(path: str | Path, tokenizer: Tokenizer, num_proc: int = 1) -> FeatureStore:
    """Features of a JSON-lines file in memory; arguments and errors as for :func:`tokenise_file`."""
    chunks, counts = [], TokenCounts()
    for chunk, of_chunk in tokenise_file(path, tokenizer, num_proc):
        chunks.append(chunk)
        counts += of_chunk
    return FeatureStore(chunks, counts)

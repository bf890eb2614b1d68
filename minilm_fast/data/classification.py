"""Sentences and pairs of sentences that are to be classified: tables of examples, and the token ids of each."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilm_fast.config import ROBERTA_TYPES
from minilm_fast.data.examples import decode_line, read_lines
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

UNLABELLED = -1
"""Label of an example whose file has none."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """One or two texts and the number of their label, or a score where the task is a regression."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Table:
    """Which columns of a tab-separated file are wanted.

    Attributes:
        names: for each wanted column its possible names, the first that is there counts.
        numbers: in place of names, for a file without a row of names.
    """

    names: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] | None = None

    def rows(self, path: str | Path, optional: int = 0) -> Iterator[tuple[str, list[str]]]:
        """The wanted fields of every line, and what an error message calls the line.

        Lines that have too few columns are passed over with a warning.

        Args:
            path: a file, maybe compressed with gzip or xz.
            optional: so many of the last columns may be missing; their fields are then empty.

        Raises:
            UserError: the file cannot be read, or its first line does not name a column.
        """
        columns = None if self.numbers is None else list(self.numbers)
        short: list[str] = []
        for number, content in read_lines(path):
            where = f"{path}:{number}"
            fields = decode_line(content, where).rstrip("\r\n").split("\t")
            if columns is None:
                columns = self._columns(fields, where, optional)
            elif len(fields) <= max(columns):
                short.append(where)
            else:
                yield where, [fields[column] if column >= 0 else "" for column in columns]
        if short:
            lines = "1 line has" if len(short) == 1 else f"{len(short)} lines have"
            warnings.warn(
                f"{path}: {lines} too few columns, passed over (the first: line {short[0].rsplit(':')[-1]})",
                stacklevel=2,
            )

    def _columns(self, header: list[str], where: str, optional: int) -> list[int]:
        found = []
        for number, names in enumerate(self.names):
            name = next((name for name in names if name in header), None)
            if name is None and number < len(self.names) - optional:
                raise UserError(f"{where}: no column {' or '.join(map(repr, names))} (there are {', '.join(header)})")
            found.append(-1 if name is None else header.index(name))
        return found


def label_number(text: str, labels: Sequence[str], where: str) -> int:
    """The number of a label.

    Raises:
        UserError: it is not one of ``labels``.
    """
    try:
        return labels.index(text)
    except ValueError:
        raise UserError(f"{where}: the label {text!r} is not one of {', '.join(labels)}") from None


@dataclass(frozen=True, slots=True)
class ClassificationFeature:
    """An example as the network reads it.

    Attributes:
        input_ids: int32 ``[tokens]``, special tokens included.
        first: so many tokens from the start have token type 0, the others 1.
        label: number of the label, or a score.
    """

    input_ids: np.ndarray
    first: int
    label: float


class ClassificationFeatures(Sequence[ClassificationFeature]):
    """Many features in few arrays.

    Args:
        ids: int32, the token ids of all features one after the other.
        lengths: tokens of each feature.
        first, labels: of each feature, see :class:`ClassificationFeature`.

    Attributes:
        lengths: int64 ``[features]``, tokens of each.
        labels: fp64 ``[features]``.
    """

    def __init__(self, ids: np.ndarray, lengths: Sequence[int], first: Sequence[int], labels: Sequence[float]) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._ids = ids
        self._first = np.asarray(first, dtype=np.int32)
        self.labels = np.asarray(labels, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> ClassificationFeature:  # type: ignore[override]
        end = int(self._ends[index])
        ids = self._ids[end - int(self.lengths[index]) : end]
        return ClassificationFeature(ids, int(self._first[index]), float(self.labels[index]))


def make_classification_features(
    examples: Sequence[TextExample], tokenizer: Tokenizer, max_seq_length: int, *, token_types: bool = True
) -> ClassificationFeatures:
    """``[CLS] a [SEP] b [SEP]`` as the family writes it; of two texts the longer one is cut first.

    Args:
        max_seq_length: the longest, special tokens included.
        token_types: whether the second text has token type 1 (never with RoBERTa's and XLM-R's tokenizers).
    """
    roberta = tokenizer.model_type in ROBERTA_TYPES
    between = [tokenizer.sep_id] * (2 if roberta else 1)
    # One growing array: an array for each example would take as much memory as the texts.
    ids, lengths, first = array("i"), [], []
    for example in examples:
        parts = [tokenizer.encode(text) for text in example.texts]
        _cut(parts, max_seq_length - 2 - (len(between) if len(parts) == 2 else 0))
        one = [tokenizer.cls_id, *parts[0]]
        if len(parts) == 2:
            one += between
        start = len(one)
        one += [*(parts[1] if len(parts) == 2 else []), tokenizer.sep_id]
        second = len(parts) == 2 and token_types and not roberta
        ids.extend(one)
        lengths.append(len(one))
        first.append(start if second else len(one))
    labels = [example.label for example in examples]
    return ClassificationFeatures(np.frombuffer(ids, dtype=np.int32), lengths, first, labels)


def _cut(parts: list[list[int]], room: int) -> None:
    """Cuts the longer of two texts token by token until both fit; of equal ones the second."""
    if len(parts) == 1:
        del parts[0][room:]
        return
    first, second = map(len, parts)
    excess = first + second - room
    if excess <= 0:
        return
    # First the longer one is brought down to the other's length, then both in turn, the second before the first.
    longer = min(excess, abs(first - second))
    if first > second:
        first -= longer
    else:
        second -= longer
    excess -= longer
    del parts[0][first - excess // 2 :]
    del parts[1][second - (excess + 1) // 2 :]

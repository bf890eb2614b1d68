"""Raw text: documents from files or a data set, read as a stream.

A source gives *fragments*: a piece of text, and whether its document ends with it. No fragment of a text file is longer
than about a mebibyte, so a document may be larger than memory.

* Text: a line is a fragment. Documents end at a blank line, or with ``documents="line"`` at every line. A line longer
  than a mebibyte is cut at white space, or between two characters where there is none.
* JSON lines (``.jsonl``, ``.json``): the text field of each record is a document.
* CSV and TSV (``.csv``, ``.tsv``): the text column of each row is a document; the first row names the columns.
* ``datasets``: the text column of each row is a document.

The end of a file ends a document. All files may be compressed with gzip or xz.
"""

from __future__ import annotations

import codecs
import csv
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minilm_fast.data.examples import LONGEST_LINE, decode_line, opened, parse_record, read_lines
from minilm_fast.errors import UserError

# A text, and whether the document ends after it.
Fragment = tuple[str, bool]

BOUNDARIES = ("blank_line", "line")
_BLOCK = 1 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")


class Corpus(Protocol):
    """Where text comes from."""

    def fragments(self) -> Iterator[Fragment]:
        """All documents, a fragment at a time."""

    def identity(self) -> dict[str, Any]:
        """Plain values that differ if the text may differ."""

    def describe(self) -> str:
        """What messages call it."""


def expand(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that names and patterns (``*``, ``?``, ``**``) stand for; those of one pattern in alphabetical order.

    Raises:
        UserError: nothing is there.
    """
    found: list[Path] = []
    for pattern in patterns:
        names = [str(pattern)] if os.path.exists(pattern) else sorted(glob.glob(str(pattern), recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            raise UserError(f"{pattern}: no such file")
        found += files
    return found


@dataclass(frozen=True)
class FileCorpus:
    """Text, JSON-lines and CSV files, told by the ends of their names.

    Args:
        paths: gone through in this order.
        text_field: field of a record, or column.
        documents: where the documents of text files end: ``"blank_line"`` or ``"line"``.
    """

    paths: Sequence[Path]
    text_field: str = "text"
    documents: str = "blank_line"

    def fragments(self) -> Iterator[Fragment]:
        """See :class:`Corpus`.

        Raises:
            UserError: a file cannot be read, is no UTF-8 text or lacks the field; file and line are named.
        """
        for path in self.paths:
            kind = _kind(path)
            if kind == "jsonl":
                yield from _json_fragments(path, self.text_field)
            elif kind in ("csv", "tsv"):
                yield from _table_fragments(path, self.text_field, "\t" if kind == "tsv" else ",")
            else:
                yield from _text_fragments(path, self.documents == "line")

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files, and how they are read."""
        return {
            "files": [[os.path.realpath(path), *_stamp(path)] for path in self.paths],
            "text_field": self.text_field,
            "documents": self.documents,
        }

    def describe(self) -> str:
        """See :class:`Corpus`."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"


@dataclass(frozen=True)
class DatasetCorpus:
    """A data set that the package ``datasets`` finds by its name, read as a stream.

    Args:
        name: on the hub, or a folder.
        configuration, split, revision: as ``datasets.load_dataset`` takes them.
        text_field: the column.
    """

    name: str
    configuration: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"

    def fragments(self) -> Iterator[Fragment]:
        """See :class:`Corpus`.

        Raises:
            UserError: the data set cannot be opened or read, or has no such column.
        """
        try:
            import datasets
        except ImportError:
            raise UserError("a data set by name needs: pip install 'minilm_fast[train]'") from None
        try:
            rows = datasets.load_dataset(
                self.name, self.configuration, split=self.split, revision=self.revision, streaming=True
            )
            for number, row in enumerate(rows):
                yield from _document(_text_of(row, self.text_field, f"{self.describe()}: row {number}"))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.describe()}: {reason}") from None

    def identity(self) -> dict[str, Any]:
        """Names only: whether a data set has changed cannot be told without reading it."""
        names = ("name", "configuration", "split", "revision", "text_field")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """See :class:`Corpus`."""
        return f"data set {self.name} ({self.split})"


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    kind = name.rpartition(".")[2]
    return "jsonl" if kind in ("json", "jsonl") else kind


def _text_of(record: Any, field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: no {field!r} (there are {', '.join(map(repr, record))})")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: {field!r} is not a text")
    return record[field]


def _document(text: str) -> Iterator[Fragment]:
    """The lines of a document that is in memory, as fragments."""
    # Half a surrogate pair, which JSON can hold, is no character.
    lines = _SURROGATES.sub("\ufffd", text).split("\n")
    for line in lines[:-1]:
        yield line, False
    yield lines[-1], True


def _json_fragments(path: Path, field: str) -> Iterator[Fragment]:
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        yield from _document(_text_of(parse_record(decode_line(line, where), where), field, where))


def _table_lines(path: Path) -> Iterator[str]:
    with opened(path) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB")
            yield decode_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, f"{path}:{number}")


def _table_fragments(path: Path, column: str, delimiter: str) -> Iterator[Fragment]:
    limit = csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(_table_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) > len(header):
                raise UserError(f"{where}: {len(row)} columns, the first row names {len(header)}")
            if row:
                yield from _document(_text_of(dict(zip(header, row, strict=False)), column, where))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _text_fragments(path: Path, per_line: bool) -> Iterator[Fragment]:
    open_document = False
    for text, begins, ends in _text_blocks(path):
        ends_document = per_line and ends
        if text and not text.isspace():
            yield text, ends_document
            open_document = not ends_document
        elif open_document and (ends_document or (begins and ends)):
            yield "", True
            open_document = False
    if open_document:
        yield "", True


def _text_blocks(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Lines, or the parts of a long line; whether a line begins with the text, and whether it ends after it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, carried, begins = 1, "", True
    with opened(path) as stream:
        while block := stream.readline(_BLOCK):
            if number == 1 and begins:
                block = block.removeprefix(codecs.BOM_UTF8)
            if b"\0" in block:
                raise UserError(f"{path}:{number}: NUL bytes: the file is damaged or not UTF-8 text")
            ends = block.endswith(b"\n")
            try:
                text = carried + decoder.decode(block, final=ends or len(block) < _BLOCK - len(codecs.BOM_UTF8))
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8 text") from None
            # The white space goes with the word after it, where byte-level vocabularies want it.
            cut = -1 if ends else max(text.rfind(" "), text.rfind("\t"))
            cut = cut if cut > 0 else len(text)
            text, carried = text[:cut], text[cut:]
            yield text, begins, ends
            begins = ends
            number += ends
    if decoder.getstate()[0]:
        raise UserError(f"{path}:{number}: not UTF-8 text")
    if carried:
        yield carried, begins, True

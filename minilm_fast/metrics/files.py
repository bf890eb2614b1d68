"""Reading predictions and references, and finding the prediction files that a pattern means."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilm_fast.data.examples import opened, parse_record, without_compression
from minilm_fast.errors import UserError
from minilm_fast.metrics.normalize import join_wordpieces

TEXT, JSON_LINES = "text", "jsonl"
# Fields that may hold the references, the first one present counts; 'ref_tok' is Du et al.'s tokenised question.
SUMMARY_FIELDS = ("refs", "tgt")
QUESTION_FIELDS = ("refs", "ref_tok", "tgt")
# What stands beside the output of decoding and of the original's scripts.
_SIDE_FILES = (".post", ".rouge", ".trace.pickle", ".partial.jsonl", ".json")
_SAVE_BEST = "save_best."
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Gold:
    """The references of a file.

    Attributes:
        name: of the file.
        references: those of each example that are not blank; may be none.
        field: where they were found; None in a file of plain lines.
        records: the JSON objects; none in a file of plain lines.
    """

    name: str
    references: list[list[str]]
    field: str | None = None
    records: Sequence[dict[str, Any]] = ()

    def texts(self, name: str) -> list[str]:
        """A field of every example, which holds a text or WordPiece tokens.

        Raises:
            UserError: an example lacks it, or it holds something else.
        """
        return [_text(record, name, f"{self.name}:{number}") for number, record in enumerate(self.records, 1)]


def read_lines(name: str) -> list[str]:
    """The lines of a text file, plain, gzip or xz; one line break at the end is none of them.

    Raises:
        UserError: the file cannot be read, is empty, or a line is not UTF-8.
    """
    with opened(name) as stream:
        data = stream.read()
    if not data:
        raise UserError(f"{name} is empty")
    return [_decoded(line, f"{name}:{number}") for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1)]


def read_gold(name: str, file_format: str | None, fields: Sequence[str]) -> Gold:
    """References, from plain lines or JSON lines.

    Args:
        name: of the file.
        file_format: ``text`` or ``jsonl``; None: JSON lines if the name says so or the file begins with ``{``.
        fields: of a JSON line; the first that the first line has is read in all. A list is several references in
            ``refs``, WordPiece tokens elsewhere.

    Raises:
        UserError: the file cannot be read or is empty, a line is wrong, or no example has a reference.
    """
    lines = read_lines(name)
    if file_format is None:
        json_lines = without_compression(name).endswith((".json", ".jsonl")) or lines[0].lstrip().startswith("{")
        file_format = JSON_LINES if json_lines else TEXT
    gold = _from_json(name, lines, fields) if file_format == JSON_LINES else _from_text(name, lines)
    if not any(gold.references):
        raise UserError(f"{name}: all references are empty")
    return gold


def read_exceptions(folder: str) -> dict[str, str]:
    """Base forms of irregular words, from WordNet's files ``noun.exc``, ``verb.exc``, ``adj.exc`` and ``adv.exc``.

    ROUGE-1.5.5 has them in ``data/WordNet-2.0-Exceptions``, NLTK's download ``wordnet`` those of version 3.0. Each line
    is a word and its base forms, the first of which counts; a word of several files is the last one's.

    Raises:
        UserError: a file is missing or a line has no base form.
    """
    found: dict[str, str] = {}
    for part in ("noun", "verb", "adj", "adv"):
        path = os.path.join(folder, f"{part}.exc")
        for number, line in enumerate(read_lines(path), 1):
            words = line.split()
            if len(words) < 2:
                raise UserError(f"{path}:{number}: not a word and its base form")
            found[words[0]] = words[1]
    return found


def find_predictions(patterns: Sequence[str]) -> list[str]:
    """The files that names and patterns mean, without the side files of decoding and scoring.

    Raises:
        UserError: a pattern matches no file.
    """
    found: list[str] = []
    for pattern in patterns:
        literal = os.path.exists(pattern) and not os.path.isdir(pattern)
        names = [pattern] if literal else [name for name in glob.glob(pattern) if _is_prediction(name)]
        if not names:
            raise UserError(f"--pred {pattern}: there is no such file")
        found += sorted(names, key=_by_numbers)
    return list(dict.fromkeys(found))


def _is_prediction(name: str) -> bool:
    base = os.path.basename(name)
    return os.path.isfile(name) and not base.endswith(_SIDE_FILES) and not base.startswith(_SAVE_BEST)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts ``ckpt-500`` before ``ckpt-1000``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None


def _from_text(name: str, lines: Sequence[str]) -> Gold:
    return Gold(name, [[line.strip()] if line.strip() else [] for line in lines])


def _from_json(path: str, lines: Sequence[str], fields: Sequence[str]) -> Gold:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    if not lines:
        raise UserError(f"{path} holds no examples")
    records = [parse_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    found = next((name for name in fields if name in records[0]), None)
    if found is None:
        raise UserError(f"{path}:1: no {' or '.join(map(repr, reversed(fields)))}")
    references = [_texts(record, found, f"{path}:{number}") for number, record in enumerate(records, 1)]
    return Gold(path, [[text for text in texts if text.strip()] for texts in references], found, records)


def _texts(record: dict[str, Any], name: str, where: str) -> list[str]:
    value = record.get(name)
    if name != "refs" or isinstance(value, str):
        return [_text(record, name, where)]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: no {name!r}" if name not in record else f"{where}: {name!r} is no list of texts")
    return [_whole(text) for text in value]


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise UserError(f"{where}: no {name!r}")
    value = record[name]
    if isinstance(value, list) and all(isinstance(token, str) for token in value):
        return _whole(join_wordpieces(value))
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is neither a text nor a list of tokens")
    return _whole(value)


def _whole(text: str) -> str:
    """Half a surrogate pair, which JSON can hold, is no character."""
    return _SURROGATES.sub("\ufffd", text)

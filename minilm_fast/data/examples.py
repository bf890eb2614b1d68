"""Reading s2s-ft JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_fast.errors import UserError


@dataclass(frozen=True)
class Example:
    """One line of a data file: two texts, or two lists of tokens."""

    source: str | list[str]
    target: str | list[str]


def parse_record(line: str, where: str) -> dict[str, Any]:
    """The JSON object on one line.

    Args:
        line: JSON text.
        where: what an error message names, such as ``train.jsonl:3``.

    Raises:
        UserError: broken JSON, or something else than an object.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    return record


def text_or_tokens(record: dict[str, Any], name: str, where: str) -> str | list[str]:
    """A field in one of the two formats: a text, or a list of tokens.

    Raises:
        UserError: the field is missing or something else.
    """
    if name not in record:
        raise UserError(f"{where}: no {name!r}")
    value = record[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(token, str) for token in value):
        return value
    raise UserError(f"{where}: {name!r} is neither a text nor a list of tokens")


def parse_example(line: str, where: str) -> Example:
    """The example on one line.

    Args:
        line: JSON text.
        where: what an error message names, such as ``train.jsonl:3``.

    Raises:
        UserError: broken JSON, a missing or empty field, text beside tokens.
    """
    record = parse_record(line, where)
    source, target = text_or_tokens(record, "src", where), text_or_tokens(record, "tgt", where)
    if type(source) is not type(target):
        raise UserError(f"{where}: 'src' and 'tgt' must both be texts or both be lists of tokens")
    if not target or (isinstance(target, str) and not target.strip()):
        raise UserError(f"{where}: 'tgt' is empty")
    return Example(source, target)


def read_examples(path: str | Path) -> Iterator[Example]:
    """Examples of a JSON-lines file; blank lines are passed over.

    Raises:
        UserError: the file cannot be read or holds no example, or a line is wrong (it is named by its number).
    """
    found = False
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield parse_example(line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if not found:
        raise UserError(f"{path} holds no examples")

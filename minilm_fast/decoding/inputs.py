"""Reading what is to be decoded: JSON lines whose ``src`` is a text or a list of tokens."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence

from minilm_fast.data.examples import opened, parse_record, reading, text_or_tokens
from minilm_fast.errors import UserError

Source = str | list[str]
STANDARD = "-"

_SURROGATES = re.compile("[\ud800-\udfff]")


def read_sources(name: str, subset: int = 0) -> list[Source]:
    """The sources of a file, one a line; other keys than ``src`` are not looked at.

    Args:
        name: a file, plain, gzip or xz, or ``-`` for standard input.
        subset: if positive, the first so many lines only.

    Every line says by its own content whether it is a text or a list of tokens. Blank lines may stand at the end.

    Raises:
        UserError: the file cannot be read or is empty, or a line is wrong; it is named by its number.
    """
    label = "standard input" if name == STANDARD else name
    lines = _read(name, label).rstrip(b" \t\r\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"{label} is empty")
    return [_parse(line, f"{label}:{number}") for number, line in enumerate(lines[: subset or None], 1)]


def mixture(sources: Sequence[Source]) -> tuple[int, int] | None:
    """The first lines that hold a text and a list of tokens, counted from 1; None if all are of one kind."""
    firsts = {type(source): number for number, source in reversed(list(enumerate(sources, 1)))}
    return (firsts[str], firsts[list]) if len(firsts) > 1 else None


def digest(sources: Sequence[Source]) -> str:
    """SHA-256 of the sources, whatever else is in their file."""
    found = hashlib.sha256()
    for source in sources:
        found.update(json.dumps(source).encode() + b"\n")
    return found.hexdigest()


def _read(name: str, label: str) -> bytes:
    if name != STANDARD:
        with opened(name) as stream:
            return stream.read()
    with reading(label):
        return sys.stdin.buffer.read()


def _parse(line: bytes, where: str) -> Source:
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    if not text.strip():
        raise UserError(f'{where}: a blank line; an empty source is {{"src": ""}}')
    source = text_or_tokens(parse_record(text, where), "src", where)
    # Half a surrogate pair is no character: tokenizers either drop it or cannot encode it.
    return _SURROGATES.sub("\ufffd", source) if isinstance(source, str) else source

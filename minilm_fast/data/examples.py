"""Reading s2s-ft JSON lines, plain or compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_fast.errors import UserError

_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"
# No line of text is as long: what has none of this size is not JSON lines, and must not fill the memory.
LONGEST_LINE = 1 << 28
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
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
    return Example(_without_surrogates(source), _without_surrogates(target))


def _without_surrogates(value: str | list[str]) -> str | list[str]:
    # Half a surrogate pair is no character: tokenizers either drop it or cannot encode it.
    return _SURROGATES.sub("\ufffd", value) if isinstance(value, str) else value


def decode_line(line: bytes, where: str) -> str:
    """Text of one line.

    Raises:
        UserError: the line is no UTF-8, or holds NUL bytes, which a crash or another encoding leaves.
    """
    if b"\0" in line:
        raise UserError(f"{where}: NUL bytes: the file is damaged or not UTF-8 text")
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None


def decompressed(stream: io.BufferedReader) -> io.BufferedIOBase:
    """The content of a stream that is plain, gzip or xz (told by its first bytes)."""
    head = stream.peek(len(_XZ))
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=stream)
    if head.startswith(_XZ):
        return lzma.LZMAFile(stream)
    return stream


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file that is plain, gzip or xz (told by its first bytes); blank lines are passed over.

    Lines end at ``\\n`` only and are counted from 1. A byte-order mark at the start of a line is dropped.

    Raises:
        UserError: the file cannot be read, is cut off or damaged, or a line is longer than 256 MiB.
    """
    with opened(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MiB: not JSON lines")
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


@contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file that is plain, gzip or xz (told by its first bytes).

    Raises:
        UserError: the file cannot be read, is cut off or damaged; also while the block reads it.
    """
    with reading(path), open(path, "rb") as stream, closing(decompressed(stream)) as content:
        yield content


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Within the block what goes wrong with reading ``name`` becomes a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None
    except EOFError:
        raise UserError(f"cannot read {name}: the compressed file is cut off") from None
    except (zlib.error, lzma.LZMAError):
        raise UserError(f"cannot read {name}: the compressed file is damaged") from None


def without_compression(name: str) -> str:
    """The name of a file without the ending of gzip or xz."""
    return name.removesuffix(".gz").removesuffix(".xz")


def read_examples(path: str | Path) -> Iterator[Example]:
    """Examples of a JSON-lines file, plain, gzip or xz; blank lines are passed over.

    Raises:
        UserError: the file cannot be read or holds no example, or a line is wrong (it is named by its number).
    """
    found = False
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        yield parse_example(decode_line(line, where), where)
        found = True
    if not found:
        raise no_examples(path)


def no_examples(path: str | Path) -> UserError:
    """The error for a file without a single example."""
    return UserError(f"{path} holds no examples: it is empty or has blank lines only")

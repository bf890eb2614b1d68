"""Reading and writing consecutive pickles that hold plain data only, such as the original's score traces.

A pickle is a program for a stack machine. Before one is run here, its instructions are read and every one must be
known to build plain data: dictionaries, lists, tuples, numbers, strings, booleans and ``None``. Nothing is ever
imported or called, and no instruction can ask for more memory than a small multiple of the file's size.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any, TypedDict

from .errors import UserError

PROTOCOL = 4

# Instructions whose length is known, in runs; the bound keeps the matcher's own memory small.
_PLAIN_RUN = re.compile(
    rb"(?:[(\]})eaustld\x85\x86\x87N\x88\x89\x94]"
    rb"|G.{8}|K.|M..|J.{4}"  # float, integers of 1, 2 and 4 bytes
    rb"|q.|r..\x00\x00|h.|j.{4}"  # memo: put (with an index below 65536), get
    rb"){1,256}",
    re.DOTALL,
)
_STOP, _PROTO, _FRAME, _LONG_BINPUT = b".", b"\x80", b"\x95", b"r"
# Instructions followed by a length and that many bytes: strings and long integers.
_COUNTED = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q", b"\x8a": "<B", b"\x8b": "<I"}
_TRACE_KEYS = ("scores", "wids", "ptrs")


class Trace(TypedDict):
    """One sentence's beam search: lists ``[steps][beams]``.

    ``scores`` are log-probabilities, ``wids`` token ids, ``ptrs`` the beam that each slot continues.
    """

    scores: list[list[float]]
    wids: list[list[int]]
    ptrs: list[list[int]]


def load_records(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the objects of a file of consecutive pickles, one at a time.

    Raises:
        UserError: the file is missing or empty, a record is cut off or damaged, or it holds more than plain data.
            The message names the file and the record, counted from 1.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if not size:
                raise UserError(f"{path}: the file is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                position, number = 0, 0
                while position < size:
                    number += 1
                    try:
                        end = _record_end(data, position, size)
                        record = _unpickle(data[position:end])
                    except _Rejected as error:
                        raise UserError(f"{path}: record {number}: {error}") from None
                    yield record
                    position = end
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def load_traces(path: str | os.PathLike[str]) -> Iterator[Trace]:
    """Yield the score traces of a ``.trace.pickle`` file in the original's format.

    The file starts with ``{"version": ..., "num_samples": N}``; N traces follow.

    Raises:
        UserError: as :func:`load_records`; also if the header or a trace has another form, or their number is not N.
    """
    records = load_records(path)
    header = next(records)
    expected = header.get("num_samples") if isinstance(header, dict) else None
    if not isinstance(expected, int) or isinstance(expected, bool) or expected < 0:
        raise UserError(f"{path}: record 1: not a trace file (num_samples is missing)")
    count = 0
    for count, record in enumerate(records, 1):
        if count > expected:
            raise UserError(f"{path}: the header says {expected} traces, and there are more")
        problem = _trace_problem(record)
        if problem:
            raise UserError(f"{path}: record {count + 1}: not a trace: {problem}")
        yield record
    if count < expected:
        raise UserError(f"{path}: the header says {expected} traces, found {count}")


def dumps(record: Any) -> bytes:
    """Pickle plain data so that :func:`load_records`, and ``pickle.load``, read it.

    Raises:
        TypeError: ``record`` holds something else than plain data.
    """
    data = pickle.dumps(record, protocol=PROTOCOL)
    try:
        end = _record_end(data, 0, len(data))
    except _Rejected as error:
        raise TypeError(f"only plain data can be written: {error}") from None
    assert end == len(data)
    return data


def dump(record: Any, stream: IO[bytes]) -> None:
    """Append one record to a binary stream.

    Raises:
        TypeError: ``record`` holds something else than plain data.
    """
    stream.write(dumps(record))


class _Rejected(Exception):
    """Why a record cannot be read."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _Rejected(f"refused: it refers to {module}.{name}, and only plain data is read")


def _unpickle(data: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise _Rejected(f"the pickle is damaged ({error})") from None


def _record_end(data: bytes | mmap.mmap, start: int, size: int) -> int:
    """Check the instructions of one pickle; returns the position after it."""
    position = start
    while True:
        run = _PLAIN_RUN.match(data, position)
        if run:
            position = run.end()
            continue
        operation = data[position : position + 1]
        if operation == _STOP:
            return position + 1
        position = _after_special(data, position, start, size, operation)


def _after_special(data: bytes | mmap.mmap, position: int, start: int, size: int, operation: bytes) -> int:
    if operation in _COUNTED:
        form = _COUNTED[operation]
        body = position + 1 + struct.calcsize(form)
        if body <= size:
            (length,) = struct.unpack(form, data[position + 1 : body])
            if body + length <= size:
                return body + length
    elif operation == _PROTO and position + 2 <= size:
        return position + 2
    elif operation == _FRAME and position + 9 <= size:
        return position + 9
    elif operation == _LONG_BINPUT and position + 5 <= size:
        # The memo is an array as long as the largest index, and honest writers count up from 0.
        if struct.unpack("<I", data[position + 1 : position + 5])[0] > position - start:
            raise _Rejected("refused: the pickle asks for more memory than its size explains")
        return position + 5
    elif operation and operation not in b"GKMJqhj" and operation not in (_PROTO, _FRAME, _LONG_BINPUT):
        raise _Rejected(f"refused: instruction {operation!r} at byte {position} is not needed for plain data")
    raise _Rejected("the file is cut off")


def _trace_problem(record: Any) -> str | None:
    if not isinstance(record, Mapping) or not all(isinstance(record.get(key), list) for key in _TRACE_KEYS):
        return f"expected lists under {', '.join(_TRACE_KEYS)}"
    steps, beams = len(record["scores"]), None
    for key in _TRACE_KEYS:
        numbers = {int, float} if key == "scores" else {int}
        if len(record[key]) != steps:
            return f"{len(record[key])} steps of {key}, {steps} of scores"
        for row in record[key]:
            if not isinstance(row, list) or not set(map(type, row)) <= numbers:
                return f"{key} must hold lists of numbers"
            beams = len(row) if beams is None else beams
            if len(row) != beams:
                return f"{key} has rows of {beams} and of {len(row)} beams"
    return None

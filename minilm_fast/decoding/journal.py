"""A journal of finished sentences beside the output, so that a run that is killed loses nothing.

The first line says which run it belongs to: everything that an answer depends on. Each further line is the result of
one sentence. A process appends to a journal of its own; together the journals hold all results.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minilm_fast.atomic import remove_quietly, sync_folder
from minilm_fast.errors import UserError

Header = Mapping[str, Any]
Record = dict[str, Any]

KIND = "minilm_fast.decode"
SYNC_SECONDS = 5.0
_FIRST_BYTES = b'{"journal": "' + KIND.encode()


def journal_path(output: Path, rank: int = 0) -> Path:
    """Where the process ``rank`` keeps its journal for an output file."""
    return output.with_name(f"{output.name}.partial{f'.{rank}' if rank else ''}.jsonl")


def journals_of(output: Path) -> list[Path]:
    """The journals that there are for an output file, the first process' first."""
    form = re.compile(re.escape(output.name) + r"\.partial(?:\.(\d+))?\.jsonl")
    found = [(int(match[1] or 0), path) for path in output.parent.iterdir() if (match := form.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_journal(path: Path) -> bool:
    """Whether a file is a journal, or the beginning of one."""
    with open(path, "rb") as stream:
        return _is_first_line(stream.readline(len(_FIRST_BYTES)))


@dataclass(frozen=True)
class Scan:
    """What a journal holds.

    Attributes:
        offsets: sentence -> position of its line.
        end: position after the last whole line.
        dropped: bytes after it, which a killed run left unfinished.
    """

    offsets: dict[int, int]
    end: int
    dropped: int


def scan(path: Path, header: Header) -> Scan:
    """Reads a journal.

    Args:
        header: what the first line must say; ``header["examples"]`` is the number of sentences.

    Raises:
        UserError: the journal cannot be read, is no journal, or belongs to another run (the message says by what).
    """
    offsets: dict[int, int] = {}
    end = 0
    try:
        with open(path, "rb") as stream:
            first = stream.readline()
            if not _is_first_line(first):
                raise _foreign(path)
            found = _whole(first)
            if found is not None:
                _check_same(path, found, header)
                end = stream.tell()
                for line in iter(stream.readline, b""):
                    record = _whole(line)
                    if record is None or not _is_result(record, header["examples"]):
                        break
                    offsets.setdefault(record["index"], end)
                    end = stream.tell()
            return Scan(offsets, end, os.fstat(stream.fileno()).st_size - end)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class Journal:
    """The journal that this process appends to, locked against other runs.

    Args:
        path: the file; created if need be.
        header: identifies the run.
        resume: keep the results that are there, else start it anew.

    Attributes:
        count: results in it.

    Raises:
        UserError: it cannot be written, another run is writing it, or it belongs to another run.
    """

    def __init__(self, path: Path, header: Header, resume: bool) -> None:
        self.path = path
        self.count = 0
        try:
            self._file = _open_locked(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        fresh = not os.fstat(self._file.fileno()).st_size
        try:
            end = 0 if fresh else self._keep(header, resume)
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._write({"journal": KIND, **header})
            self._sync()
            sync_folder(path.parent)
        except (OSError, UserError) as error:
            # What was there before stays, whoever it belongs to.
            if fresh:
                self.close()
            self._file.close()
            raise self._unwritable(error) if isinstance(error, OSError) else error from None

    def _keep(self, header: Header, resume: bool) -> int:
        if not resume:
            if not is_journal(self.path):
                raise _foreign(self.path)
            return 0
        found = scan(self.path, header)
        self.count = len(found.offsets)
        return found.end

    def append(self, record: Record) -> None:
        """Adds the result of a sentence; it is in the hands of the operating system on return.

        Raises:
            UserError: it cannot be written; the results before it are kept.
        """
        try:
            self._write(record)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise self._unwritable(error) from None
        self.count += 1

    def close(self) -> None:
        """Lets go of the file; a journal without results is removed."""
        if self._file.closed:
            return
        if not self.count and _is_at(self._file, self.path):
            remove_quietly(self.path)
        self._file.close()

    def _write(self, record: Header) -> None:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":") if "index" in record else None)
        rest = memoryview(line.encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror}")


class MergedJournals:
    """The results of all journals of an output.

    Args:
        paths: the journals.
        header: what they must say.

    Attributes:
        done: sentences that have a result.
        dropped: bytes at the end of journals that a killed run left unfinished.

    Raises:
        UserError: a journal belongs to another run.
    """

    def __init__(self, paths: Sequence[Path], header: Header) -> None:
        self._places: dict[int, tuple[Path, int]] = {}
        self.dropped = 0
        for path in paths:
            found = scan(path, header)
            self.dropped += found.dropped
            for index, offset in found.offsets.items():
                self._places.setdefault(index, (path, offset))
        self.done = self._places.keys()

    def in_order(self) -> Iterator[Record]:
        """The results, read from disk one by one in the order of the input."""
        streams: dict[Path, IO[bytes]] = {}
        try:
            for index in sorted(self._places):
                path, offset = self._places[index]
                if path not in streams:
                    streams[path] = open(path, "rb")  # noqa: SIM115 - closed below
                streams[path].seek(offset)
                yield json.loads(streams[path].readline())
        finally:
            for stream in streams.values():
                stream.close()


def _open_locked(path: Path) -> io.FileIO:
    while True:
        # Without a buffer a line is with the operating system, and survives a kill, as soon as it is written.
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                raise UserError(f"{path}: another run is writing to it") from None
            # Some network file systems have no locks.
        if _is_at(file, path):
            return file
        # The run that held it has just ended and removed it.
        file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _is_first_line(line: bytes) -> bool:
    return line.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(line)


def _foreign(path: Path) -> UserError:
    return UserError(f"{path}: not a journal of a decoding run; move it out of the way")


def _whole(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None if the line was cut off or is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _is_result(record: Mapping[str, Any], examples: int) -> bool:
    numbers = (record.get(name) for name in ("index", "source_length", "truncated", "unknown"))
    return (
        isinstance(record.get("text"), str)
        and all(isinstance(number, int) for number in numbers)
        and 0 <= record["index"] < examples
    )


def _check_same(path: Path, found: Header, header: Header) -> None:
    names = [name for name in header if found.get(name) != json.loads(json.dumps(header[name]))]
    if names:
        raise UserError(
            f"{path}: belongs to a run with another {', '.join(names)}; leave out --resume to start anew, or give the "
            f"flags and files of that run"
        )

"""Writing files so that a reader, or a run that starts after a crash, sees the old content or the new, never a part."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary stream whose content becomes ``path`` when the block ends without an exception.

    The bytes go to a temporary file in the same folder, which is synced to disk and renamed over ``path``; then
    the folder is synced. If anything fails, the temporary file is removed and the old content stays.

    Raises:
        UserError: the file cannot be written (no such folder, no permission, no space), or ``path`` is a folder, a
            device or a pipe, which must not be replaced by a file.
    """
    target = Path(path)
    name = temporary_name(target)
    _check_replaceable(target)
    try:
        stream = open(name, "xb")  # noqa: SIM115 - closed in the block that can remove it
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, target)
        sync_folder(target.parent)
    except OSError as error:
        remove_quietly(name)
        if error.filename is not None and Path(error.filename) not in (name, target):
            raise  # of another file, which the block deals with
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        remove_quietly(name)
        raise


def _check_replaceable(target: Path) -> None:
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise UserError(f"{target}: cannot be written: it is {kind}")


def temporary_name(target: Path) -> Path:
    """A name beside ``target`` that nothing else uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def sync_file(path: str | os.PathLike[str]) -> None:
    """Force a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Force a folder's entries to disk, where the file system can."""
    with suppress(OSError):
        sync_file(path)


def remove_quietly(path: str | os.PathLike[str]) -> None:
    """Remove a file that may be gone already."""
    with suppress(OSError):
        os.unlink(path)

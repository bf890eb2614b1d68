"""Where a command's lines go: a file, written whole or not at all; standard output; or a device."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from minilm_fast.atomic import atomic_write
from minilm_fast.errors import UserError

STANDARD = "-"
TRACE_SUFFIX = ".trace.pickle"


class Destination:
    """An output by name.

    Args:
        name: a file; ``-`` for standard output; a device or pipe, which is written in place.

    Attributes:
        path: the file.
        is_file: whether it is a file, new or old, so that other files can lie beside it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name)
        self.is_file = name != STANDARD and not _is_special(name)

    @property
    def trace_path(self) -> Path:
        """The original's name for the score traces beside the output."""
        return Path(self.name + TRACE_SUFFIX)

    def check(self) -> None:
        """Makes sure, before any work is done, that the output can be written as far as can be told.

        Raises:
            UserError: it is a folder, or its folder is missing or not writable.
        """
        if not self.is_file:
            return
        folder = Path(os.path.realpath(self.path)).parent
        if self.path.is_dir():
            raise UserError(f"{self.name}: cannot be written: it is a folder")
        if not folder.is_dir():
            raise UserError(f"{self.name}: cannot be written: there is no folder {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{self.name}: cannot be written: the folder {folder} is not writable")

    def write(self, lines: Iterable[str]) -> None:
        """Writes the lines as UTF-8.

        Raises:
            UserError: they cannot be written; a file that was there before is as it was.
        """
        data = (line.encode() + b"\n" for line in lines)
        if self.is_file:
            # Through a symbolic link, like any program that opens it for writing.
            with atomic_write(os.path.realpath(self.path)) as stream:
                stream.writelines(data)
            return
        try:
            if self.name == STANDARD:
                sys.stdout.buffer.writelines(data)
                sys.stdout.flush()
            else:
                with open(self.path, "wb") as stream:
                    stream.writelines(data)
        except OSError as error:
            if self.name == STANDARD:
                _abandon_standard_output()
            name = "standard output" if self.name == STANDARD else self.name
            raise UserError(f"{name}: cannot be written: {error.strerror}") from None


def _is_special(name: str) -> bool:
    """Whether the name leads to a device, a pipe or an open file of a process, which cannot be replaced."""
    folder = Path(os.path.realpath(os.path.dirname(name)))
    if folder == Path("/dev") or Path("/proc") in folder.parents:
        return True
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _abandon_standard_output() -> None:
    # What is left in the buffer would fail once more, and loudly, when the interpreter ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)

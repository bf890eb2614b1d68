"""Loading of the compiled extension ``minilm_fast._C``, unless it was built for another version of this code.

Its operators register themselves as it is loaded, so whether it fits is read from the file before that.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import warnings

INTERFACE = 2
"""Equals ``MINILM_FAST_INTERFACE`` of ``csrc/include/interface.h``, where it says what the number stands for."""

NAME = "minilm_fast._C"
_MARK = re.compile(rb"minilm_fast-interface:(\d+);")


def _outdated() -> str | None:
    """Why the extension does not fit this code; None if it does, or is not there."""
    spec = importlib.util.find_spec(NAME)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    try:
        with open(spec.origin, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _MARK.search(content)
            number = int(found[1]) if found else 0
    except (OSError, ValueError):
        # It cannot be read, or is empty; the import says so.
        return None
    if number == INTERFACE:
        return None
    age = "older" if number < INTERFACE else "newer"
    return (
        f"the compiled extension {spec.origin} is {age} than the Python code (interface {number}, not {INTERFACE}); "
        f"build it again: make setup"
    )


def _load() -> str | None:
    """Imports the extension; returns None if it is there and fits, otherwise the reason why not."""
    if OUTDATED is not None:
        return OUTDATED
    try:
        from minilm_fast import _C  # noqa: F401
    except ImportError as error:
        return f"the compiled extension {NAME} cannot be imported ({error})"
    return None


OUTDATED = _outdated()
if OUTDATED is not None:
    warnings.warn(f"all operators run in plain PyTorch, which is slower: {OUTDATED}", RuntimeWarning, stacklevel=2)
EXTENSION_ERROR = _load()

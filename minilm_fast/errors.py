"""Errors that a user's input can cause."""

from __future__ import annotations

from types import TracebackType


class UserError(Exception):
    """Something is wrong with a file, a flag or a value that the user gave.

    The message is one line that names the file, the line or the flag. The command lines print it as
    ``error: <message>`` and exit with status 2; library users catch it like any exception.
    """


class Terminated(BaseException):
    """The process was asked to end (``SIGTERM``)."""


class NotEnoughMemory(UserError):
    """Memory, of the machine or of a GPU, does not suffice; the message names the flag to lower."""


_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, or came up while one that says so was handled.

    The second is what happens in the capture of a CUDA graph, which cannot end well after a failed allocation.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class enough_memory:
    """Within the block an error for want of memory becomes one :class:`NotEnoughMemory`.

    It does not hold the tensors of the frames in which memory ran out, so that the process can go on with less.

    Args:
        advice: names the flag to lower.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The frame of this function is in the traceback of what it raises.
        del traceback
        if not isinstance(error, (MemoryError, RuntimeError)) or not is_out_of_memory(error):
            return
        seen: BaseException | None = error
        while seen is not None:
            seen.__traceback__ = None
            seen = seen.__cause__ or seen.__context__
        raise NotEnoughMemory(f"not enough memory; {self._advice}") from None

"""``SIGTERM`` and ``SIGINT`` that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

from minilm_fast.errors import Terminated

WAITING = (signal.SIGTERM, signal.SIGINT)


class DeferredSignals:
    """Within the block the first signal is noted; the second one acts at once, as it would outside.

    Attributes:
        received: number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WAITING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def stop(number: int) -> NoReturn:
    """Raise what the signal stands for: ``Terminated`` or ``KeyboardInterrupt``."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

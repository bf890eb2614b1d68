"""Work on a stream of items in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from minilm_fast.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Larger inputs are worth the start of several processes, in bytes.
_LARGE = 1 << 26
_MOST_BY_DEFAULT = 8
# More bring nothing, and operating systems refuse them.
_MOST = 1024

_worker: Callable[[Any], Any]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_count(asked: int | None, size: int) -> int:
    """How many processes work on an input of ``size`` bytes: as many as asked for, or by the size."""
    if asked is not None:
        return asked
    return min(_MOST_BY_DEFAULT, available_cores()) if size > _LARGE else 1


def _end_with_the_parent() -> None:
    # The pool's workers would wait for work for ever if their parent were killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start(function: Callable[[Any], Any]) -> None:
    global _worker
    # Ctrl-C reaches the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _worker = function


def _call(item: Any) -> Any:
    return _worker(item)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_proc: int, name: str
) -> Iterator[Result]:
    """``function`` of every item, in order; only a few items a process are held at a time.

    Args:
        function: can be pickled; sent to each process once.
        num_proc: with 1 this process does it all.
        name: what is tokenised, for the error.

    Raises:
        UserError: a process ended.
    """
    if num_proc <= 1:
        yield from map(function, items)
        return
    num_proc = min(num_proc, _MOST)
    # Forking would copy the locks of threads that are running here.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, context, initializer=_start, initargs=(function,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"{name}: a process that tokenised it ended (out of memory?); try fewer processes") from None
    finally:
        pool.shutdown(cancel_futures=True)

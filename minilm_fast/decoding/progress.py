"""A progress bar on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress:
    """Counts sentences; shows their number, sentences a second and the time left.

    Args:
        total: sentences in all.
        done: sentences that an earlier run finished.
        show: whether anything is shown.
        label: stands before the bar.
    """

    def __init__(self, total: int, done: int = 0, show: bool = True, label: str = "") -> None:
        self._bar: Any = None
        if show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=" sentences",
                bar_format=_FORMAT,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more sentence is done."""
        if self._bar is not None:
            self._bar.update()

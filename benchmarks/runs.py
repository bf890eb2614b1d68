"""Many trainings whose scores make one table: kept in a file, so that the same command goes on; means over seeds."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine


class Results:
    """What has been measured, kept in a file.

    Args:
        settings: what all runs have in common; a file with other settings is refused.
        limit_seconds: after so many seconds it is :meth:`late`.
    """

    def __init__(self, path: Path, settings: dict[str, Any], limit_seconds: float | None = None) -> None:
        self.path = path
        self.values: dict[str, Any] = {"settings": settings, "machine": machine.describe(), "runs": {}}
        self._end = None if limit_seconds is None else time.monotonic() + limit_seconds
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                different = [name for name in settings if found["settings"].get(name) != settings[name]]
                sys.exit(f"error: {path} is of another run (different: {', '.join(different)})")
            self.values = found

    def __contains__(self, name: str) -> bool:
        return name in self.values["runs"]

    @property
    def runs(self) -> dict[str, Any]:
        """What was added, by name."""
        return dict(self.values["runs"])

    def add(self, name: str, value: dict[str, Any]) -> None:
        """Keep a result."""
        self.values["runs"][name] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def late(self) -> bool:
        """Whether nothing new is to be begun."""
        return self._end is not None and time.monotonic() > self._end


def settings_of(options: Any, free: Sequence[str]) -> dict[str, Any]:
    """The command line as it is kept in the file, but for the options that may differ from call to call."""
    values = {name: value for name, value in vars(options).items() if name not in free}
    return dict(json.loads(json.dumps(values, default=str)))


def mean_and_spread(scores: Sequence[float]) -> str:
    """Mean, standard deviation and number of scores between 0 and 1, in percent; ``-`` if there is none."""
    percent = [100 * score for score in scores]
    if not percent:
        return "-"
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.1f}{spread} ({len(percent)})"


def split_file(folder: Path, split: str) -> Path:
    """``SPLIT.tsv`` of a task, maybe compressed."""
    file = next(iter(sorted(folder.glob(f"{split}.tsv*"))), None)
    if file is None:
        sys.exit(f"error: {folder} has no {split}.tsv")
    return file

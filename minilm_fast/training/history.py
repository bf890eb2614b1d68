"""``history.json``: a record for every checkpoint, and which of them is the best."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm_fast.atomic import atomic_write

# A loss: the mean one, or that of one relation of a distillation.
_LOSS = re.compile(r".*loss|dev_[qkv]{2}")


class History:
    """Records of a run.

    Args:
        path: the file.
        metric: what decides which checkpoint is the best: the lowest of a loss (a name that ends in ``loss``, or a
            relation's, such as ``dev_qk``), otherwise the highest; the earliest of equals.

    Attributes:
        records: one mapping for each checkpoint, with ``"step"`` and what was measured.
    """

    def __init__(self, path: Path, metric: str) -> None:
        self.path = path
        self.metric = metric
        self.records: list[dict[str, float]] = []

    def load(self, step: int) -> None:
        """Read the records of checkpoints up to ``step``; a file that cannot be read counts as empty."""
        try:
            records = json.loads(self.path.read_text(encoding="utf-8"))["records"]
            self.records = [record for record in records if record["step"] <= step]
            if not all(isinstance(value, (int, float)) for record in self.records for value in record.values()):
                self.records = []
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.records = []

    def has(self, step: int) -> bool:
        """Whether the checkpoint after ``step`` has a record."""
        return any(record["step"] == step for record in self.records)

    def add(self, record: dict[str, float]) -> None:
        """Add a record and write the file."""
        self.records.append(record)
        content = {"best": self.best(), "records": self.records}
        with atomic_write(self.path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def best(self) -> dict[str, Any] | None:
        """See :func:`best_record`."""
        return best_record(self.records, self.metric)


def best_record(records: Sequence[Mapping[str, float]], metric: str) -> dict[str, Any] | None:
    """``step``, ``metric`` and ``value`` of the best of several records; None if nothing was measured.

    Args:
        metric: as for :class:`History`.
    """
    measured = [record for record in records if math.isfinite(record.get(metric, math.nan))]
    if not measured:
        return None
    sign = 1 if _LOSS.fullmatch(metric) else -1
    best = min(measured, key=lambda record: sign * record[metric])
    return {"step": best["step"], "metric": metric, "value": best[metric]}

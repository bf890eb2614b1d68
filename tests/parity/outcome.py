"""Counts of comparisons with the golden files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
TOLERANCE = 1e-4


@dataclass
class Outcome:
    """Comparisons made and those that failed."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        """Counts a comparison; ``what`` describes it should it have failed."""
        if good:
            self.passed += 1
        else:
            self.failures.append(what)

    @property
    def total(self) -> int:
        return self.passed + len(self.failures)

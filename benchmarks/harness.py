"""Runs measured systems in child processes, in turn, and summarises what they took.

The parent imports neither torch nor any peer: it stays small and idle while a child is measured. Children live through
the whole benchmark, so that the rounds can be interleaved (A B C, A B C, ...): a disturbance of the machine then hits
all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from minilm_fast.errors import UserError

WORKER = Path(__file__).resolve().parent / "worker.py"


class WorkerError(UserError):
    """A child process failed; one line."""


class Unsupported(UserError):
    """The child cannot do what it was asked for on this machine; the message says why."""


class Worker:
    """One child process that answers requests; use it as a context manager."""

    def __init__(self, label: str, threads: int, script: Path = WORKER) -> None:
        self.label = label
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; waits until it is gone. Closing twice is harmless."""
        if self._log.closed:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            Unsupported: the peer cannot do it here.
            WorkerError: the request failed, or the child died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.label}: the process ended during {command!r}: {self._last_words()}")
        reply = json.loads(line)
        if "unsupported" in reply:
            raise Unsupported(reply["unsupported"])
        if "error" in reply:
            raise WorkerError(f"{self.label}: {command} failed: {reply['error']}")
        result: dict[str, Any] = reply["ok"]
        return result

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"


@dataclass
class Series:
    """The runs of one system, in the order in which they were made."""

    runs: list[dict[str, float]] = field(default_factory=list)

    def per_sequence(self, key: str) -> list[float]:
        """Seconds a sequence of every run; ``key`` is ``cpu`` or ``wall``."""
        return [run[key] / run["sequences"] for run in self.runs]

    def median(self, key: str) -> float:
        return statistics.median(self.per_sequence(key))

    def spread(self, key: str) -> tuple[float, float]:
        values = self.per_sequence(key)
        return min(values), max(values)

    def ratio_to(self, other: Series, key: str) -> float:
        """Median over the rounds of ``self / other``, each round's runs made one after the other."""
        pairs = zip(self.per_sequence(key), other.per_sequence(key), strict=False)
        return statistics.median(mine / theirs for mine, theirs in pairs)

"""The interface that every measured system implements."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from shapes import DecodeWorkload, ModelShape


class NotSupported(Exception):
    """The peer cannot do this job here; the message says why."""


@dataclass(frozen=True)
class DecodeJob:
    """What to build and decode.

    ``folder`` holds the vocabulary and the prepared cousin models, ``original`` is a checkout of s2s-ft. ``as_text``
    asks for strings in place of ready tokens, where the peer has a tokenizer.
    """

    shape: ModelShape
    load: DecodeWorkload
    dtype: str
    threads: int
    seed: int
    folder: Path
    original: Path | None = None
    as_text: bool = False

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["folder"] = str(self.folder)
        values["original"] = None if self.original is None else str(self.original)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DecodeJob:
        original = values["original"]
        return cls(
            **{
                **values,
                "shape": ModelShape(**values["shape"]),
                "load": DecodeWorkload(**values["load"]),
                "folder": Path(values["folder"]),
                "original": None if original is None else Path(original),
            }
        )

    def sources(self, specials: int) -> list[list[int]]:
        """Random ids of ordinary words, ``load.source - specials`` of them for each sequence of the batch."""
        generator = random.Random(self.seed)
        lowest = min(1000, self.shape.vocab // 2)
        length = self.load.source - specials
        return [[generator.randrange(lowest, self.shape.vocab) for _ in range(length)] for _ in range(self.load.batch)]


@dataclass(frozen=True)
class Measurement:
    """One run: seconds on the clock, and CPU-seconds summed over all threads of the process."""

    wall: float
    cpu: float
    sequences: int
    steps: int


class System(ABC):
    """One system in one dtype. ``build`` comes first and is not timed."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    """The dtypes that the system can be asked for; ``build`` may still refuse one on this CPU."""

    def __init__(self, dtype: str) -> None:
        if dtype not in self.dtypes:
            raise NotSupported(f"{self.name} does not run in {dtype}")

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def settings(self) -> str:
        """How the system is run, for the report."""

    @abstractmethod
    def build(self) -> None:
        """Load or create the model and what it needs beside.

        Raises:
            NotSupported: the system cannot run in this dtype on this CPU.
        """


class Peer(System):
    """One system that decodes a batch."""

    def __init__(self, job: DecodeJob) -> None:
        super().__init__(job.dtype)
        self.job = job

    @abstractmethod
    def decode(self, steps: int) -> list[int]:
        """Decode the batch with ``steps`` forced steps; the number of tokens in each best hypothesis."""

    def breakdown(self, steps: int) -> dict[str, float]:
        """Seconds of one run by what they were spent on; empty where the peer cannot tell."""
        return {}

    def run(self, steps: int) -> Measurement:
        """Decode once and check that every output has the forced length."""
        wall, cpu = time.perf_counter(), time.process_time()
        lengths = self.decode(steps)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if lengths != [steps] * self.job.load.batch:
            raise RuntimeError(f"{self.name} gave outputs of {lengths} tokens, {steps} were forced")
        return Measurement(wall=wall, cpu=cpu, sequences=len(lengths), steps=steps)

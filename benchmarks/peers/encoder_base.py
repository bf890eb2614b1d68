"""The interface that every measured encoder implements: token ids of a batch to its embeddings."""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers.base import System

PREPARED_CASES = "cases.json"
ONNX_FILE = "model.onnx"
ONNX_INT8_FILE = "model-int8.onnx"
CTRANSLATE_FOLDER = "ctranslate2"
OPENVINO_INT8_FILE = "openvino-int8.xml"


@dataclass(frozen=True)
class EncoderJob:
    """What to build.

    ``model`` is a folder of a checkpoint, ``folder`` holds what was prepared from it: cases, and models in the forms
    that the peers load. ``settle`` is the fewest seconds that a run of a case takes; short cases are repeated.
    """

    model: Path
    folder: Path
    dtype: str
    threads: int
    settle: float = 0.5

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": str(self.model), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EncoderJob:
        return cls(**{**values, "model": Path(values["model"]), "folder": Path(values["folder"])})


@dataclass(frozen=True)
class Case:
    """Batches of sequences that are encoded one after the other.

    ``fixed``: all sequences of all batches have one length, so a peer may compile for that shape.
    """

    name: str
    batches: list[list[list[int]]]

    @property
    def fixed(self) -> bool:
        return len({len(batch) for batch in self.batches}) == 1 == len({len(s) for b in self.batches for s in b})

    @property
    def sequences(self) -> int:
        return sum(map(len, self.batches))

    @property
    def tokens(self) -> int:
        """Real tokens; padding does not count."""
        return sum(len(sequence) for batch in self.batches for sequence in batch)

    @property
    def padded(self) -> int:
        """Tokens when each batch is filled up to its longest sequence."""
        return sum(len(batch) * max(map(len, batch)) for batch in self.batches)


@dataclass(frozen=True)
class Padded:
    """A batch filled up on the right: int64 ``[batch, length]`` each."""

    input_ids: np.ndarray
    attention_mask: np.ndarray

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> Padded:
        lengths = np.array([len(sequence) for sequence in sequences])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate([np.asarray(sequence) for sequence in sequences])
        return cls(ids, mask.astype(np.int64))

    def wider(self) -> Padded:
        """The same batch with one more column of padding."""
        return Padded(*(np.pad(part, ((0, 0), (0, 1))) for part in (self.input_ids, self.attention_mask)))

    def feed(self) -> dict[str, np.ndarray]:
        """The inputs of the ONNX model."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return dict(zip(names, (self.input_ids, self.attention_mask, np.zeros_like(self.input_ids)), strict=True))


class EncoderPeer(System):
    """One encoder in one dtype; neither ``build`` nor ``ready`` is timed."""

    def __init__(self, job: EncoderJob, cases: Sequence[Case]) -> None:
        super().__init__(job.dtype)
        self.job = job
        self.cases = {case.name: case for case in cases}
        self._ready: dict[str, list[Any]] = {}

    @abstractmethod
    def ready(self, sequences: list[list[int]]) -> Any:
        """A batch in the form that ``encode`` takes."""

    @abstractmethod
    def encode(self, batch: Any, case: Case) -> np.ndarray:
        """Embeddings fp32 ``[batch, hidden]``: the mean of the last layer's vectors, scaled to length 1."""

    def prepare(self) -> dict[str, np.ndarray]:
        """Brings the batches of all cases into the peer's form and encodes each once: nothing is left to compile.

        Returns:
            the embeddings of all sequences of each case, in order.
        """
        found = {}
        for case in self.cases.values():
            batches = [self.ready(batch) for batch in case.batches]
            self._ready[case.name] = batches
            found[case.name] = np.concatenate([np.array(self.encode(batch, case), np.float32) for batch in batches])
        return found

    def run(self, name: str) -> dict[str, float]:
        """Encodes a case again and again for a while.

        Returns:
            ``wall``, ``cpu``: seconds of one pass, the median on the clock and the mean of the CPU-seconds of all
            threads; ``passes``: how many.
        """
        case, batches = self.cases[name], self._ready[name]
        self.encode(batches[0], case)
        walls: list[float] = []
        cpu, start = time.process_time(), time.perf_counter()
        while not walls or time.perf_counter() - start < self.job.settle:
            begin = time.perf_counter()
            for batch in batches:
                self.encode(batch, case)
            walls.append(time.perf_counter() - begin)
        cpu = (time.process_time() - cpu) / len(walls)
        return {"wall": statistics.median(walls), "cpu": cpu, "passes": len(walls)}


def once_per_shape(case: Case, make: Callable[[bool], Any], made: dict[str, Any]) -> Any:
    """What ``make(fixed)`` gives: one for each case of a fixed shape, one for all others together."""
    key = case.name if case.fixed else ""
    if key not in made:
        made[key] = make(case.fixed)
    return made[key]

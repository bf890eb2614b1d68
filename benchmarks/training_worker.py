"""The child process of ``training.py``: one trainer alone in a process. Started by ``harness.py``."""

from __future__ import annotations

import random
import time
from typing import Any

import machine
import torch
from shapes import ModelShape
from trainers import TRAINERS, Trainer, TrainJob
from worker import serve

from minilm_fast.data.masking import Sample


def make_samples(lengths: list[list[int]], vocabulary: int, seed: int) -> list[Sample]:
    """Pseudo-masked samples of random words with the given numbers of source and target tokens."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(5, vocabulary) for _ in range(count)]

    return [Sample(words(s), words(t), words(t), list(range(t)), words(t)) for s, t in lengths]


class Session:
    """The trainer of this process and its batches."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.batches: list[list[Sample]] = []

    def build(
        self, name: str, job: dict[str, Any], lengths: list[list[int]], batch: int, threads: int, seed: int
    ) -> dict[str, Any]:
        """Build the trainer and make one step on the first and on the longest batch."""
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        parsed = TrainJob(**{**job, "shape": ModelShape(**job["shape"])})
        samples = make_samples(lengths, parsed.shape.vocab, seed)
        self.batches = [samples[i : i + batch] for i in range(0, len(samples), batch)]
        self.trainer = TRAINERS[name](parsed)
        self.trainer.step(self.batches[0])
        self.trainer.step(max(self.batches, key=lambda b: sum(s.length for s in b)))
        return {"label": self.trainer.name, "settings": self.trainer.settings()}

    def run(self) -> dict[str, Any]:
        """One pass over the batches."""
        assert self.trainer is not None
        busy, cpu, start = machine.busy_seconds(), time.process_time(), time.perf_counter()
        losses = [self.trainer.step(batch) for batch in self.batches]
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        others = max(0.0, machine.busy_seconds() - busy - cpu) / wall
        sequences = sum(len(batch) for batch in self.batches)
        return {"wall": wall, "cpu": cpu, "sequences": sequences, "others": others, "loss": sum(losses) / len(losses)}

    def memory(self) -> dict[str, Any]:
        return {"peak": machine.peak_memory()}

    def peak(self, threads: int) -> dict[str, Any]:
        return {"peak": machine.measure_peak(threads)}


if __name__ == "__main__":
    serve(Session())

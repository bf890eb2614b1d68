"""The child process of a benchmark: one measured system alone in a process, told what to do line by line.

Requests are JSON objects on standard input, answers JSON objects on the descriptor that was standard output when the
process began; everything that libraries print goes to standard error. Started by ``harness.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cousin
import machine
import peers
import vocabulary
from peers.base import DecodeJob, NotSupported, Peer
from shapes import ModelShape


class Session:
    """What this process has built so far."""

    def __init__(self) -> None:
        self.peer: Peer | None = None

    def built(self) -> Peer:
        if self.peer is None:
            raise RuntimeError("nothing was built yet")
        return self.peer

    def prepare(self, shape: dict[str, Any], seed: int, folder: str, formats: list[str]) -> dict[str, Any]:
        """Write the vocabulary and the models that the peers load."""
        model_shape = ModelShape(**shape)
        vocabulary.write(model_shape.vocab, Path(folder))
        if formats:
            cousin.prepare(model_shape, seed, Path(folder), with_ctranslate2="ctranslate2" in formats)
        return {}

    def build(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """Build the peer and decode once with few steps, so that first-call costs stay out of the runs."""
        parsed = DecodeJob.from_json(job)
        self.peer = peers.create(name, parsed)
        self.peer.build()
        self.peer.run(min(2, parsed.load.steps))
        return {"version": self.peer.version(), "settings": self.peer.settings()}

    def run(self) -> dict[str, Any]:
        peer = self.built()
        busy, start = machine.busy_seconds(), time.perf_counter()
        measured = peer.run(peer.job.load.steps)
        others = machine.busy_seconds() - busy - measured.cpu
        return {**asdict(measured), "others": max(0.0, others) / (time.perf_counter() - start)}

    def alone(self, as_text: bool) -> dict[str, Any]:
        """Rebuild the batch as one sequence."""
        peer = self.built()
        peer.job = replace(peer.job, load=replace(peer.job.load, batch=1), as_text=as_text)
        peer.build()
        peer.run(min(2, peer.job.load.steps))
        return {}

    def breakdown(self) -> dict[str, Any]:
        peer = self.built()
        return {"seconds": peer.breakdown(peer.job.load.steps)}

    def memory(self) -> dict[str, Any]:
        return {"peak": machine.peak_memory()}

    def peak(self, threads: int) -> dict[str, Any]:
        return {"peak": machine.measure_peak(threads)}


def answer(session: object, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; an error becomes part of the reply."""
    command = request.pop("do")
    try:
        return {"ok": getattr(session, command)(**request)}
    except NotSupported as error:
        return {"unsupported": str(error)}
    except ImportError as error:
        return {"unsupported": f"{error} (the peers are in the extra minilm_fast[bench])"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def serve(session: object) -> None:
    """Answers requests by the session's methods until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(session, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve(Session())

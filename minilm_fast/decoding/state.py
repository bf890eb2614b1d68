"""State of a search: the tensors of :class:`minilm_fast.ops.BeamState`, one after the other in one buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from minilm_fast.decoding.options import SearchOptions
from minilm_fast.decoding.result import Hypothesis, Trace
from minilm_fast.ops import BeamState

ALIGNMENT = 16


class StateLayout:
    """Where the tensors of so many rows lie in a buffer of bytes: first those that an answer is read from.

    Attributes:
        bytes: size of the buffer.
        answer_bytes: size of the part that :func:`winner` reads.
    """

    def __init__(self, rows: int, options: SearchOptions) -> None:
        beams, length, traced = options.beam_size, options.max_tgt_length, options.traced_frames
        answer = {
            "best_score": ((rows,), torch.float64),
            "running": ((rows,), torch.bool),
            "frame": ((rows,), torch.int32),
            "best_length": ((rows,), torch.int32),
            "all_ended": ((rows,), torch.int32),
            "best_tokens": ((rows, length), torch.int32),
        }
        history = {
            "scores": ((rows, beams), torch.float32),
            "tokens": ((rows, beams, length), torch.int32),
            "trace_scores": ((rows, traced, beams), torch.float32),
            "trace_ids": ((rows, traced, beams), torch.int32),
            "trace_parents": ((rows, traced, beams), torch.int32),
        }
        work = {
            "steps": ((rows,), torch.int32),
            "last_ids": ((rows, beams), torch.int32),
            "ancestry": ((rows, beams, length + options.entering), torch.int32),
            "lengths": ((rows, beams), torch.int32),
            "suppress": ((rows, beams), torch.bool),
        }
        self._places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self.bytes = self.answer_bytes = 0
        for fields in (answer, history, work):
            for name, (shape, dtype) in fields.items():
                size = math.prod(shape) * dtype.itemsize
                self._places[name] = (self.bytes, self.bytes + size, shape, dtype)
                self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
            # Greedy search and traces are read from what follows, too.
            if fields is answer or (fields is history and (not options.constrained or traced)):
                self.answer_bytes = self.bytes

    def over(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that lie in a buffer, or in its beginning, uint8 ``[bytes]``; they share its memory."""
        return {
            name: buffer[start:end].view(dtype).view(shape)
            for name, (start, end, shape, dtype) in self._places.items()
            if end <= buffer.numel()
        }


def new_state(rows: int, options: SearchOptions, device: torch.device) -> BeamState:
    """State of rows that stand still and have had no token."""
    layout = StateLayout(rows, options)
    return BeamState(**layout.over(torch.zeros(layout.bytes, dtype=torch.uint8, device=device)))


def winner(state: Mapping[str, torch.Tensor], row: int, options: SearchOptions) -> Hypothesis:
    """The answer of an example that has finished, from tensors on the CPU."""
    frames, all_ended = int(state["frame"][row]), int(state["all_ended"][row])
    last_frame = all_ended if all_ended >= 0 else frames - 1
    best_score = float(state["best_score"][row])
    if not options.constrained:
        score = best_score if math.isfinite(best_score) else float(state["scores"][row, 0])
        return Hypothesis(state["tokens"][row, 0, :frames].tolist(), score, last_frame)
    trace = None
    if options.need_score_traces:
        scores, chosen, parents = (state[f"trace_{name}"][row].tolist() for name in ("scores", "ids", "parents"))
        trace = Trace(scores, chosen, parents, last_frame)
    ids = state["best_tokens"][row, : int(state["best_length"][row])].tolist()
    return Hypothesis(ids, best_score, last_frame, trace)

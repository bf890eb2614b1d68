"""Score traces: the original's file, and the choice of an output from one."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilm_fast import safe_pickle
from minilm_fast.atomic import atomic_write
from minilm_fast.safe_pickle import Trace

VERSION = 0.0


def padded_lengths(
    source_lengths: Sequence[int], batch_size: int, max_tgt_length: int, max_seq_length: int
) -> list[int]:
    """Frames of every example's trace in the original's file, where traces are padded to their batch's length.

    The original sorts examples by falling length, cuts them into batches, and pads to the longest source of a batch
    plus the longest target.

    Args:
        source_lengths: tokens that were read, special tokens included.
    """
    order = sorted(range(len(source_lengths)), key=lambda index: -source_lengths[index])
    frames = [0] * len(order)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index in batch:
            frames[index] = min(source_lengths[batch[0]] + max_tgt_length, max_seq_length)
    return frames


def write_traces(path: str | os.PathLike[str], traces: Iterable[Mapping[str, Any]], frames: Sequence[int]) -> None:
    """Writes a trace file in the original's format: a header, then ``scores``, ``wids``, ``ptrs`` of each example.

    Args:
        path: the file, which is replaced at once.
        traces: lists ``[steps][beams]`` by name.
        frames: what each is padded to with zeros.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(os.path.realpath(path)) as stream:
        safe_pickle.dump({"version": VERSION, "num_samples": len(frames)}, stream)
        for trace, length in zip(traces, frames, strict=True):
            record = {
                "scores": _pad(trace["scores"], length, 0.0),
                "wids": _pad(trace["wids"], length, 0),
                "ptrs": _pad(trace["ptrs"], length, 0),
            }
            safe_pickle.dump(record, stream)


def _pad(rows: Sequence[Sequence[float]], length: int, zero: float) -> list[list[float]]:
    # Each row is a list of its own: a list that occurs twice is pickled as a reference.
    missing = [[zero] * len(rows[0]) for _ in range(length - len(rows))]
    return [list(row) for row in rows[:length]] + missing


def best_sequence(
    trace: Trace,
    sep_id: int,
    pad_id: int,
    *,
    length_penalty: float | None = None,
    alpha: float | None = None,
    expect: float | None = None,
) -> list[int]:
    """The ids of the hypothesis of a trace that is best under a criterion; empty if there is none.

    Candidates are the hypotheses that end in a frame, up to the first frame in which all have ended, and every one
    of the last frame. The first of equal ones wins.

    Args:
        trace: padded with zeros or not.
        sep_id, pad_id: ``[SEP]`` and ``[PAD]``, which both end a hypothesis.
        length_penalty: added to a score for each token; with ``expect`` subtracted for each token more or less.
        alpha: unless ``length_penalty`` is given, a score is divided by ``((5 + length) / 6) ** alpha``.
        expect: expected length.

    Raises:
        IndexError: a pointer leads out of its frame.
    """
    scores, ids, parents = trace["scores"], trace["wids"], trace["ptrs"]
    end_ids = (sep_id, pad_id)
    last = _last_frame(trace, end_ids, pad_id)
    best, place = -math.inf, (-1, -1)
    for frame in range(last + 1):
        for slot, token in enumerate(ids[frame]):
            # A log-probability is negative; anything else is padding.
            if scores[frame][slot] >= 0 or (token not in end_ids and frame < last):
                continue
            value = _value(scores[frame][slot], frame + 1, length_penalty, alpha, expect)
            if value > best:
                best, place = value, (frame, slot)
    frame, slot = place
    sequence = []
    while frame >= 0:
        sequence.append(ids[frame][slot])
        slot = parents[frame][slot]
        if frame and not 0 <= slot < len(ids[frame - 1]):
            raise IndexError(f"a pointer of step {frame + 1} leads to beam {slot}")
        frame -= 1
    return sequence[::-1]


def _last_frame(trace: Trace, end_ids: Sequence[int], pad_id: int) -> int:
    """The first frame in which all hypotheses have ended, else the last that is not padding; -1 if there is none."""
    ids, scores = trace["wids"], trace["scores"]
    real = len(ids)
    while real and not any(ids[real - 1]) and not any(scores[real - 1]):
        real -= 1
    last = next((frame for frame in range(real) if all(token in end_ids for token in ids[frame])), real - 1)
    while last >= 0 and all(token == pad_id for token in ids[last]):
        last -= 1
    return last


def _value(score: float, length: int, length_penalty: float | None, alpha: float | None, expect: float | None) -> float:
    if length_penalty:
        return score - length_penalty * abs(length - expect) if expect else score + length_penalty * length
    return score / ((5 + length) / 6.0) ** alpha if alpha else score


def trim_punctuation(words: Sequence[str]) -> list[str]:
    """Of more than four words, drops three of four equal punctuation marks at the end, as often as there are four."""
    kept = list(words)
    while len(kept) > 4 and len(kept[-1]) == 1 and len(set(kept[-4:])) == 1:
        if not unicodedata.category(kept[-1]).startswith("P"):
            break
        del kept[-3:]
    return kept

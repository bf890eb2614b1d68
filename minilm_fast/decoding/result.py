"""What decoding gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """Every step of a beam search, ``[frames][beams]`` each, in the form of the original's trace files.

    Frames after ``last_frame`` hold the continuations of ended hypotheses, which mean nothing.
    """

    scores: list[list[float]]
    ids: list[list[int]]
    parents: list[list[int]]
    last_frame: int

    def padded(self, frames: int) -> dict[str, list[list[float]] | list[list[int]]]:
        """The original's record: ``scores``, ``wids`` and ``ptrs``, zero-padded or cut to ``frames`` frames."""
        width = len(self.scores[0])
        missing = max(0, frames - len(self.scores))
        return {
            "scores": (self.scores + [[0.0] * width] * missing)[:frames],
            "wids": (self.ids + [[0] * width] * missing)[:frames],
            "ptrs": (self.parents + [[0] * width] * missing)[:frames],
        }


@dataclass(frozen=True)
class Hypothesis:
    """The winner of a search.

    Attributes:
        ids: target ids, the final end token included if there is one.
        score: sum of log-probabilities, divided by the length penalty's term if there is one. For greedy search
            the sum up to the end token.
        last_frame: index of the first step in which every hypothesis had ended, else the last step run.
        trace: with ``need_score_traces``.
    """

    ids: list[int]
    score: float
    last_frame: int
    trace: Trace | None = None


@dataclass(frozen=True)
class GenerationResult:
    """One decoded text.

    Attributes:
        text: detokenised output.
        tokens: its tokens, without the end token.
        ids: target ids, the final end token included if there is one.
        score: see :class:`Hypothesis`.
        source_length: tokens of the source that were read, special tokens included.
        truncated: tokens of the source beyond the limit, which were not read.
        unknown: tokens of the source that the vocabulary does not know.
        trace: with ``need_score_traces``.
    """

    text: str
    tokens: list[str]
    ids: list[int]
    score: float
    source_length: int
    truncated: int
    unknown: int
    trace: Trace | None = None

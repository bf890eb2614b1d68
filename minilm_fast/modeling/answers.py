"""The best answers of each question, from the scores of start and end in its windows.

As ``run_squad`` of transformers chooses them (BERT, arXiv 1810.04805, sections 4.2 and 4.3), but that a text is an
exact part of the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minilm_fast.data.answer_windows import Window


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are chosen; the names are those of the command line's flags.

    Args:
        n_best_size: answers of a question that are kept; also the starts and ends of a window that are looked at.
        max_answer_length: in tokens.
        version_2_with_negative: whether a question may have no answer.
        null_score_diff_threshold: the question has no answer if the score of none is above the best answer's by more.
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """An answer and the scores of its two ends; an empty text stands for no answer.

    Attributes:
        start, end: its characters in the context, ``context[start:end]``.
    """

    text: str
    start_logit: float
    end_logit: float
    start: int = 0
    end: int = 0

    @property
    def score(self) -> float:
        """Of the whole answer."""
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one question.

    Attributes:
        text: the answer, empty for none.
        candidates: the best ones, the best first, with no answer among them if that may be.
        null_odds: how far the score of no answer is above that of the best answer.
    """

    text: str
    candidates: list[Candidate]
    null_odds: float

    @property
    def chosen(self) -> Candidate:
        """The candidate that :attr:`text` is."""
        return next(candidate for candidate in self.candidates if candidate.text == self.text)

    @property
    def start(self) -> int:
        """The answer's first character in the context; 0 for none."""
        return self.chosen.start

    @property
    def end(self) -> int:
        """Where the answer ends in the context, not included; 0 for none."""
        return self.chosen.end

    @property
    def score(self) -> float:
        """Probability of the answer among the candidates: softmax of their scores."""
        return float(self._probabilities()[self.candidates.index(self.chosen)])

    def _probabilities(self) -> np.ndarray:
        scores = np.array([candidate.score for candidate in self.candidates])
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def nbest(self) -> list[dict[str, float | str]]:
        """The candidates as ``nbest_predictions_.json`` has them."""
        return [
            {
                "text": candidate.text,
                "probability": float(probability),
                "start_logit": candidate.start_logit,
                "end_logit": candidate.end_logit,
            }
            for candidate, probability in zip(self.candidates, self._probabilities(), strict=True)
        ]


def choose_answers(
    windows: Iterable[Window], logits: Iterable[np.ndarray], options: AnswerOptions
) -> dict[int, Prediction]:
    """Predictions by the number of the question.

    Args:
        windows: those of a question one after the other.
        logits: for each window fp32 ``[tokens, 2]``, scores of start and end.
    """
    pairs = groupby(zip(windows, logits, strict=True), key=lambda pair: pair[0].question)
    predictions = {}
    for number, group in pairs:
        own, scores = zip(*group, strict=True)
        predictions[number] = choose_answer(own, scores, options)
    return predictions


def choose_answer(windows: Sequence[Window], logits: Sequence[np.ndarray], options: AnswerOptions) -> Prediction:
    """The prediction for the question that all these windows belong to."""
    found: list[Candidate] = []
    for window, scores, best in zip(windows, logits, max_context(windows), strict=True):
        found += _candidates(window, scores, best, options)
    null: Candidate | None = None
    if options.version_2_with_negative:
        first = min((scores[0] for scores in logits), key=lambda pair: pair[0] + pair[1])
        null = Candidate("", float(first[0]), float(first[1]))
        found.append(null)
    found.sort(key=lambda candidate: -candidate.score)
    distinct: dict[str, Candidate] = {}
    for candidate in found:
        if len(distinct) == options.n_best_size:
            break
        distinct.setdefault(candidate.text, candidate)
    if null is not None:
        distinct.setdefault("", null)
    candidates = list(distinct.values()) or [Candidate("", 0.0, 0.0)]
    answer = next((candidate for candidate in candidates if candidate.text), None)
    if null is None:
        return Prediction(answer.text if answer else "", candidates, 0.0)
    odds = null.score - (answer.score if answer else 0.0)
    none = answer is None or odds > options.null_score_diff_threshold
    return Prediction("" if none or answer is None else answer.text, candidates, odds)


def max_context(windows: Sequence[Window]) -> list[np.ndarray]:
    """For each window bool ``[length]``: whether no other window shows more context on both sides of the token.

    That is, the smaller of the numbers of tokens before and after it, and where these are equal the longer window.
    """
    total = max(window.start + window.length for window in windows)
    best = np.full(total, -np.inf)
    owner = np.zeros(total, dtype=np.int64)
    for number, window in enumerate(windows):
        before = np.arange(window.length)
        score = np.minimum(before, before[::-1]) + 0.01 * window.length
        place = slice(window.start, window.start + window.length)
        better = score > best[place]
        best[place][better] = score[better]
        owner[place][better] = number
    return [owner[window.start : window.start + window.length] == number for number, window in enumerate(windows)]


def _candidates(window: Window, scores: np.ndarray, best: np.ndarray, options: AnswerOptions) -> list[Candidate]:
    """The answers that the best starts and ends of one window give; among these may be tokens of the question."""
    first = len(window.prefix)
    starts, ends = (_highest(column, options.n_best_size) - first for column in scores.T)
    starts = starts[(starts >= 0) & (starts < window.length)]
    starts = starts[best[starts]]
    ends = ends[(ends >= 0) & (ends < window.length)]
    lengths = ends[None, :] - starts[:, None] + 1
    offsets = window.context.offsets[window.start : window.start + window.length]
    found = []
    for i, j in np.argwhere((lengths > 0) & (lengths <= options.max_answer_length)):
        start, end = int(starts[i]), int(ends[j])
        place = int(offsets[start, 0]), int(offsets[end, 1])
        text = window.context.text[place[0] : place[1]]
        if text.strip():
            found.append(Candidate(text, float(scores[first + start, 0]), float(scores[first + end, 1]), *place))
    return found


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the highest values, the highest first, the earliest of equals first."""
    return np.argsort(-values, kind="stable")[:count]

"""Exact match and F1 of extracted answers, as the official scripts of SQuAD 1.1, SQuAD 2.0 and MLQA count them.

SQuAD 1.1: arXiv 1606.05250; SQuAD 2.0: arXiv 1806.03822; MLQA: arXiv 1910.07475. XQuAD (arXiv 1910.11856) is scored as
SQuAD 1.1. All scores are in percent.
"""

from __future__ import annotations

import functools
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilm_fast.data.squad import language_of
from minilm_fast.errors import UserError

_ENGLISH_ARTICLES = r"\b(a|an|the)\b"
# What MLQA's script takes out as articles of each language that it knows.
_ARTICLES: Mapping[str, str] = {
    "en": _ENGLISH_ARTICLES,
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "ال",
    "hi": "",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "zh": "",
}
LANGUAGES = tuple(_ARTICLES)
# These stand alone as words in Chinese answers.
_IDEOGRAPH = re.compile("([\u4e00-\u9fa5])")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


@functools.cache
def _unicode_punctuation() -> dict[int, None]:
    others = (code for code in range(sys.maxunicode) if unicodedata.category(chr(code)).startswith("P"))
    return dict.fromkeys([*map(ord, string.punctuation), *others])


def check_language(language: str | None, where: str) -> None:
    """Raise :class:`UserError` unless MLQA has the language (None: the language of SQuAD).

    Args:
        where: what the message starts with.
    """
    if language is not None and language not in _ARTICLES:
        raise UserError(f"{where}: {language!r} is not a language of MLQA ({', '.join(LANGUAGES)})")


def normalize_answer(text: str, language: str | None = None) -> str:
    """A text in lower case without punctuation and articles, one space between words.

    Args:
        language: one of ``LANGUAGES`` applies MLQA's rules; None those of SQuAD, which know ASCII punctuation only.
    """
    text = text.lower()
    if language is None:
        text = re.sub(_ENGLISH_ARTICLES, " ", text.translate(_ASCII_PUNCTUATION))
        return " ".join(text.split())
    text = text.translate(_unicode_punctuation())
    if _ARTICLES[language]:
        text = re.sub(_ARTICLES[language], " ", text)
    if language == "zh":
        text = _IDEOGRAPH.sub(r" \1 ", text)
    return " ".join(text.split())


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words of a prediction; 0 where none is right."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def squad_scores(
    answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], language: str | None = None
) -> dict[str, float]:
    """``exact_match`` and ``f1`` as SQuAD 1.1's script gives them, with a language as MLQA's.

    Args:
        answers: id -> the texts of all answers of a question, at least one.
        predictions: id -> text; a question without one scores 0.
        language: see :func:`normalize_answer`.

    Raises:
        UserError: there is no question, or one has no answer.
    """
    if not answers:
        raise UserError("there are no questions to score")
    exact = total_f1 = 0.0
    for question, texts in answers.items():
        if not texts:
            raise UserError(f"question {question} has no answer: score it with --version_2_with_negative")
        if question not in predictions:
            continue
        predicted = normalize_answer(predictions[question], language)
        gold = [normalize_answer(text, language) for text in texts]
        exact += predicted in gold
        total_f1 += max(token_f1(predicted.split(), text.split()) for text in gold)
    return {"exact_match": 100.0 * exact / len(answers), "f1": 100.0 * total_f1 / len(answers)}


def squad_v2_scores(
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    na_prob_thresh: float = 1.0,
) -> dict[str, float]:
    """What SQuAD 2.0's script gives.

    ``exact``, ``f1`` and ``total``, also of the questions with (``HasAns_``) and without (``NoAns_``) an answer; with
    ``na_probs`` also the best scores that a threshold can reach, and this threshold.

    Args:
        answers: id -> the texts of all answers, none for a question that cannot be answered.
        predictions: id -> text, empty for no answer; of every question.
        na_probs: id -> how likely a question has no answer, on any scale.
        na_prob_thresh: above it a prediction counts as no answer.

    Raises:
        UserError: there is no question, or one lacks its prediction or probability.
    """
    if not answers:
        raise UserError("there are no questions to score")
    _require(answers, predictions, "prediction")
    if na_probs is not None:
        _require(answers, na_probs, "no-answer probability")
    raw = {question: _raw_scores(texts, predictions[question]) for question, texts in answers.items()}
    final = dict(raw)
    for question, texts in answers.items():
        if na_probs is not None and na_probs[question] > na_prob_thresh:
            final[question] = (float(not texts),) * 2
    answerable = [question for question, texts in answers.items() if texts]
    others = [question for question, texts in answers.items() if not texts]
    result = _means(final, list(answers), "")
    for prefix, chosen in (("HasAns_", answerable), ("NoAns_", others)):
        if chosen:
            result |= _means(final, chosen, prefix)
    if na_probs is not None:
        for place, name in enumerate(("exact", "f1")):
            scores = {question: pair[place] for question, pair in raw.items()}
            result[f"best_{name}"], result[f"best_{name}_thresh"] = _best_threshold(
                scores, answers, predictions, na_probs
            )
    return result


def average(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean of each score over sets that all have it."""
    names = set.intersection(*(set(scores) for scores in found.values()))
    first = next(iter(found.values()))
    return {name: sum(scores[name] for scores in found.values()) / len(found) for name in first if name in names}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """F1 and exact match of sets as in MiniLM's table of MLQA: the average, then each."""
    exact = "exact" if all("exact" in scores for scores in found.values()) else "exact_match"
    rows = [["", "Average", *found]]
    for title, name in (("F1", "f1"), ("EM", exact)):
        values = [scores[name] for scores in found.values()]
        rows.append([title, *(f"{value:.1f}" for value in (sum(values) / len(values), *values))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]) + "\n"


def language_for(path: str | Path, given: str | None, version_2: bool) -> str | None:
    """Whose rules of MLQA the answers of a file are scored by; None: SQuAD's.

    Args:
        given: a language, or ``"none"``; None leaves it to the name of the file, which is looked at for SQuAD 1.1's
            format only.

    Raises:
        UserError: MLQA does not have the language, or SQuAD 2.0's score is to follow its rules.
    """
    if given is not None and given != "none":
        check_language(given, "--answer_language")
        if version_2:
            raise UserError("--answer_language is not for --version_2_with_negative")
        return given
    language = None if given == "none" or version_2 else language_of(path)
    check_language(language, f"{path}: the language of the answers by the file's name")
    return language


def _require(answers: Mapping[str, Sequence[str]], found: Mapping[str, object], what: str) -> None:
    absent = [question for question in answers if question not in found]
    if absent:
        more = f" (and of {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"there is no {what} of question {absent[0]}{more}")


def _raw_scores(texts: Sequence[str], prediction: str) -> tuple[float, float]:
    # Answers of which nothing is left count as none, and no answer is the empty text.
    gold = [text for text in map(normalize_answer, texts) if text] or [""]
    predicted = normalize_answer(prediction)
    f1 = max(token_f1(predicted.split(), text.split()) if predicted and text else predicted == text for text in gold)
    return float(predicted in gold), float(f1)


def _means(scores: Mapping[str, tuple[float, float]], questions: Sequence[str], prefix: str) -> dict[str, float]:
    count = len(questions)
    exact, f1 = (100.0 * sum(scores[question][place] for question in questions) / count for place in (0, 1))
    return {f"{prefix}exact": exact, f"{prefix}f1": f1, f"{prefix}total": count}


def _best_threshold(
    scores: Mapping[str, float],
    answers: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float],
) -> tuple[float, float]:
    """The best mean score, and the threshold that gives it: one that answers the questions up to it, in order."""
    current = best = float(sum(not texts for texts in answers.values()))
    threshold = 0.0
    for question in sorted(na_probs, key=lambda name: na_probs[name]):
        if question not in scores:
            continue
        if answers[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, na_probs[question]
    return 100.0 * best / len(scores), threshold

"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) through rouge-score, with the stemmer set to what ROUGE-1.5.5 computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from minilm_fast.errors import UserError
from minilm_fast.metrics.requirements import missing

if TYPE_CHECKING:
    import numpy as np

# Our names, and rouge-score's. ROUGE-L of texts of several lines is the summary-level one, as in ROUGE-1.5.5.
ROUGE_TYPES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
CONFIDENCE = 0.95
_LONGEST_UNSTEMMED = 3
_CHUNK = 256
# Suffixes of Porter's step 4 but for -ment, -ent and -ion.
_STEP_4 = (
    "al",
    "ance",
    "ence",
    "er",
    "ic",
    "able",
    "ible",
    "ant",
    "ement",
    "ou",
    "ism",
    "ate",
    "iti",
    "ous",
    "ive",
    "ize",
)
_WORD = re.compile("[a-z0-9]+")


@dataclass(frozen=True)
class RougeScore:
    """Means over the examples, in percent; ``low`` and ``high`` bound F with 95 % confidence where asked for."""

    precision: float
    recall: float
    f: float
    low: float | None = None
    high: float | None = None


class _Tokenizer:
    """Letters and digits in lower case; words of more than three are stemmed.

    Args:
        stemming: whether to.
        exceptions: base forms of irregular words, which come before the stemmer.
    """

    def __init__(self, stemming: bool, exceptions: Mapping[str, str]) -> None:
        self._stem = perl_stemmer() if stemming else None
        self._stems = dict(exceptions)

    def tokenize(self, text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        return [self._stemmed(word) for word in words] if self._stem else words

    def _stemmed(self, word: str) -> str:
        if len(word) <= _LONGEST_UNSTEMMED:
            return word
        stem = self._stems.get(word)
        if stem is None:
            assert self._stem is not None
            stem = self._stems[word] = self._stem(word)
        return stem


def perl_stemmer() -> Callable[[str], str]:
    """Porter's stemmer as it is in ROUGE-1.5.5.

    rouge-score's own tokenizer has NLTK's variant of it. The Perl script has Martin Porter's, and in step 4 removes
    several suffixes one after the other: ``environmental`` becomes ``environ``, not ``environment``.
    """
    from nltk.stem.porter import PorterStemmer

    class Stemmer(PorterStemmer):
        def _step4(self, word: str) -> str:
            for suffixes in (_STEP_4, ("ment",)):
                word = self._without(word, next(filter(word.endswith, suffixes), ""))
            if word.endswith("ent"):
                return self._without(word, "ent")
            return self._without(word, "ion") if word.endswith(("sion", "tion")) else word

        def _without(self, word: str, suffix: str) -> str:
            stem = word[: len(word) - len(suffix)]
            return stem if self._measure(stem) > 1 else word

    stem: Callable[[str], str] = Stemmer(mode=PorterStemmer.MARTIN_EXTENSIONS).stem
    return stem


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    stemming: bool = True,
    exceptions: Mapping[str, str] | None = None,
    resamples: int = 0,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, RougeScore]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, averaged over the examples.

    Args:
        predictions: one text an example, a sentence a line; empty ones score 0.
        references: one or more texts an example, likewise. Of several the one with the highest F counts.
        stemming: Porter's stemmer, as ``ROUGE-1.5.5 -m``.
        exceptions: base forms of irregular words (``held``: ``hold``), which that script looks up before it stems;
            :func:`minilm_fast.metrics.files.read_exceptions` reads them.
        resamples: draws of the bootstrap that gives the confidence interval of F (1000 in the seed's scripts); 0: none.
        seed: of these draws.
        processes: that share the work.

    Returns:
        ``rouge1``, ``rouge2`` and ``rougeL``, in percent.

    Raises:
        ValueError: no examples, not as many predictions as references, or an example without a reference.
        UserError: rouge-score is not installed, or one of the processes was killed.
    """
    scores = rouge_of_each(predictions, references, stemming=stemming, exceptions=exceptions, processes=processes)
    means = 100 * scores.mean(axis=0)
    bounds = 100 * _interval(scores[:, :, 2], resamples, seed) if resamples else None
    return {
        name: RougeScore(*map(float, means[place]), *(map(float, bounds[:, place]) if bounds is not None else ()))
        for place, name in enumerate(ROUGE_TYPES)
    }


def rouge_of_each(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    stemming: bool = True,
    exceptions: Mapping[str, str] | None = None,
    processes: int = 1,
) -> np.ndarray:
    """Scores of every example; arguments and errors as for :func:`rouge`.

    Returns:
        fp64 ``[examples, 3, 3]``: ROUGE-1, ROUGE-2, ROUGE-L; precision, recall, F between 0 and 1.
    """
    import numpy as np

    check_examples(predictions, references)
    starts = range(0, len(predictions), _CHUNK)
    words = exceptions or {}
    chunks = [(predictions[i : i + _CHUNK], references[i : i + _CHUNK], stemming, words) for i in starts]
    if processes <= 1 or len(chunks) == 1:
        rows = [_score_chunk(*chunk) for chunk in chunks]
    else:
        _scorer(stemming, words)
        try:
            with ProcessPoolExecutor(min(processes, len(chunks))) as pool:
                rows = list(pool.map(_score_chunk, *zip(*chunks, strict=True)))
        except BrokenProcessPool:
            raise UserError("a process that computes ROUGE was killed; fewer processes need less memory") from None
    return np.array(list(chain.from_iterable(rows)), dtype=np.float64)


def check_examples(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless there is at least one example and each has a prediction and a reference."""
    if not predictions:
        raise ValueError("there are no examples")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} references")
    for number, texts in enumerate(references, 1):
        if isinstance(texts, str):
            raise ValueError(f"example {number}: references must be a sequence of texts, not a text")
        if not texts:
            raise ValueError(f"example {number} has no reference")


def _scorer(stemming: bool, exceptions: Mapping[str, str]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing("rouge-score") from None
    return RougeScorer(list(ROUGE_TYPES.values()), tokenizer=_Tokenizer(stemming, exceptions))


def _score_chunk(
    predictions: Sequence[str], references: Sequence[Sequence[str]], stemming: bool, exceptions: Mapping[str, str]
) -> list[list[tuple[float, float, float]]]:
    scorer = _scorer(stemming, exceptions)
    pairs = zip(predictions, references, strict=True)
    found = (scorer.score_multi(texts, prediction) for prediction, texts in pairs)
    return [[tuple(scores[name]) for name in ROUGE_TYPES.values()] for scores in found]


def _interval(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bounds of the mean of each column by the bootstrap's percentiles, ``[2, columns]``."""
    import numpy as np

    generator = np.random.default_rng(seed)
    count = len(scores)
    means = np.stack([scores[generator.integers(count, size=count)].mean(axis=0) for _ in range(resamples)])
    tail = 50 * (1 - CONFIDENCE)
    return np.percentile(means, [tail, 100 - tail], axis=0)

"""The metrics of classification tasks, equal to those of scikit-learn and SciPy.

All take predictions and labels ``[examples]``. A value that is not defined is 0 where scikit-learn gives 0, and NaN
where SciPy gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of label 1; 0 if there is none and none is found."""
    found = int(((predictions == 1) & (labels == 1)).sum())
    return 2 * found / max(1, int((predictions == 1).sum() + (labels == 1).sum()))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes; 0 if a margin is empty."""
    both = [int(((predictions == p) & (labels == t)).sum()) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1))]
    tp, tn, fp, fn = both
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation; NaN if one side is constant."""
    first, second = (np.asarray(x, dtype=np.float64) for x in (predictions, labels))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale else math.nan


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values having the mean of theirs; NaN if one side is constant."""
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

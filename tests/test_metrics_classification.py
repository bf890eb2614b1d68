"""The metrics of classification tasks against scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from minilm_fast.metrics.classification import METRICS, accuracy, f1, matthews, pearson, spearman

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

CASES = [
    ([1, 1, 0, 0, 1], [1, 0, 0, 1, 1]),
    ([1, 1, 1], [1, 0, 1]),
    ([0, 0, 0], [0, 0, 0]),
    ([0, 0, 0], [1, 1, 0]),
    ([1], [1]),
]


def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.RandomState(0)
    found = [(np.array(a), np.array(b)) for a, b in CASES]
    return found + [(rng.randint(2, size=n), (rng.rand(n) < 0.3).astype(int)) for n in (2, 10, 277, 5000)]


@pytest.mark.parametrize(("predictions", "labels"), cases())
def test_two_classes(predictions: np.ndarray, labels: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert accuracy(predictions, labels) == pytest.approx(sklearn.accuracy_score(labels, predictions))
        assert f1(predictions, labels) == pytest.approx(sklearn.f1_score(labels, predictions, zero_division=0))
        assert matthews(predictions, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predictions))


def test_three_classes() -> None:
    rng = np.random.RandomState(1)
    predictions, labels = rng.randint(3, size=(2, 500))
    assert accuracy(predictions, labels) == pytest.approx(sklearn.accuracy_score(labels, predictions))


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_scores(digits: int) -> None:
    """With few digits many are equal."""
    rng = np.random.RandomState(digits)
    labels = np.round(5 * rng.rand(400), digits)
    predictions = np.round(labels + rng.randn(400), digits).astype(np.float32)
    assert pearson(predictions, labels) == pytest.approx(stats.pearsonr(predictions, labels).statistic, rel=1e-6)
    assert spearman(predictions, labels) == pytest.approx(stats.spearmanr(predictions, labels).statistic, rel=1e-9)


def test_a_constant_has_no_correlation() -> None:
    assert math.isnan(pearson(np.ones(3), np.arange(3))) and math.isnan(spearman(np.arange(3), np.ones(3)))


def test_all_have_names() -> None:
    assert set(METRICS) == {"accuracy", "f1", "matthews", "pearson", "spearman"}

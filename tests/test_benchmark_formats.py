"""The report of what number formats cost."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import formats


def test_classes() -> None:
    scores = {
        "fp32": np.array([[1.0, 0], [0, 1], [0, 1], [1, 0]]),
        "int8": np.array([[0.0, 1], [0, 1], [0, 1], [1, 0]]),
    }
    lines = formats.report_classes(scores, np.array([0, 1, 0, 0]))
    assert [line.split() for line in lines[2:]] == [["fp32", "75.00%", "0"], ["int8", "50.00%", "1"]]


def test_nearest_is_another_vector() -> None:
    vectors = np.array([[1.0, 0], [0.9, 0.4], [0, 1]])
    assert formats._nearest(vectors).tolist() == [1, 0, 1]

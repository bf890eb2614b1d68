"""GLUE (arXiv:1804.07461): its tasks, and their tsv files as they are downloaded.

Columns are found by the names in the first row, so files of the original download and re-packed ones are both read;
CoLA's training and development files have no such row. Files may be compressed with gzip or xz.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minilm_fast.data.classification import UNLABELLED, Table, TextExample, label_number
from minilm_fast.errors import UserError

_SUFFIXES = ("", ".gz", ".xz")
UNDECIDED = "-"
"""Label of a pair whose annotators did not agree."""


@dataclass(frozen=True)
class GlueTask:
    """How one task's files are read, scored and handed in.

    Attributes:
        name: as the benchmark writes it, which is also the name of its folder and of its submission.
        texts: columns of one or two sentences.
        label: possible columns of the label.
        labels: as they are written, in the order of their numbers; none: the label is a score from 0 to 5.
        metrics: what the benchmark reports (keys of :data:`minilm_fast.metrics.classification.METRICS`); the first
            decides which checkpoint is the best.
        names: what the labels mean, where they are written as numbers.
        numbers: columns of texts and label in a file without a row of names.
        dev: names of the development sets and their files.
        test: names of the submissions and their files.
    """

    name: str
    texts: tuple[str, ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    names: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "dev"})
    test: Mapping[str, str] = field(default_factory=dict)

    @property
    def regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    @property
    def meanings(self) -> tuple[str, ...]:
        """Names of the labels for people."""
        return self.names or self.labels

    @property
    def submissions(self) -> Mapping[str, str]:
        """Names of the submissions and the files that they are made from."""
        return self.test or {self.name: "test"}


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
# The order of transformers' scripts of 2020, which wrote checkpoints that do not name their labels.
THREE_WAY = ("contradiction", "entailment", "neutral")
_BINARY = ("0", "1")
MOST_SCORE = 5.0
GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA", ("sentence",), ("label",), _BINARY, ("matthews", "accuracy"), ("unacceptable", "acceptable"), (3, 1)
    ),
    "mnli": GlueTask(
        "MNLI",
        _PAIR,
        ("gold_label", "label"),
        THREE_WAY,
        dev={"matched": "dev_matched", "mismatched": "dev_mismatched"},
        test={"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"},
    ),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        ("Quality",),
        _BINARY,
        ("f1", "accuracy"),
        ("not_equivalent", "equivalent"),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ("label",), _ENTAILMENT),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        ("is_duplicate",),
        _BINARY,
        ("f1", "accuracy"),
        ("not_duplicate", "duplicate"),
    ),
    "rte": GlueTask("RTE", _PAIR, ("label",), _ENTAILMENT),
    "sst-2": GlueTask("SST-2", ("sentence",), ("label",), _BINARY, names=("negative", "positive")),
    "sts-b": GlueTask("STS-B", _PAIR, ("score",), (), ("pearson", "spearman")),
    "wnli": GlueTask("WNLI", _PAIR, ("label",), _BINARY, names=("not_entailment", "entailment")),
}


def glue_task(task: str) -> GlueTask:
    """The task of a name, in lower or upper case.

    Raises:
        UserError: it is not known.
    """
    if task.lower() not in GLUE_TASKS:
        raise UserError(f"task {task!r} is not one of {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[task.lower()]


def find_split(folder: Path, stem: str, task: GlueTask) -> Path | None:
    """The file of a split: ``STEM.tsv``, maybe compressed, in a folder or in its subfolder of the task's name."""
    for place in (folder, folder / task.name):
        for suffix in _SUFFIXES:
            path = place / f"{stem}.tsv{suffix}"
            if path.is_file():
                return path
    return None


def read_glue(path: str | Path, task: str, labels: Sequence[str] | None = None) -> list[TextExample]:
    """The examples of a task's tsv file.

    Lines that are cut short are passed over with a warning, and so are those whose annotators did not agree (``-``).

    Args:
        task: a key of ``GLUE_TASKS``, in lower or upper case.
        labels: the task's labels in another order of their numbers.

    Raises:
        UserError: the file cannot be read, lacks a column, has a label that the task does not know, or no example.
    """
    spec = glue_task(task)
    table = Table((*((name,) for name in spec.texts), spec.label), spec.numbers)
    chosen = spec.labels if labels is None else labels
    found: list[TextExample] = []
    undecided = 0
    for where, (*texts, label) in table.rows(path):
        if label == UNDECIDED and not spec.regression:
            undecided += 1
            continue
        found.append(
            TextExample(tuple(texts), _score(label, where) if spec.regression else label_number(label, chosen, where))
        )
    if not found:
        raise UserError(f"{path} holds no examples")
    warn_of_undecided(path, undecided)
    return found


def warn_of_undecided(path: str | Path, count: int) -> None:
    """Says how many examples of a file were passed over, if any."""
    if count:
        warnings.warn(f"{path}: {count} examples without a decided label are passed over", stacklevel=3)


def read_glue_test(path: str | Path, task: str) -> tuple[list[str], list[TextExample]]:
    """The numbers and texts of a test file; labels, if it has any, are not looked at.

    Returns:
        what the file's column ``index`` (or ``id``) says, counted from 0 where it has none; the examples.

    Raises:
        UserError: the file cannot be read, lacks a column, or has no example.
    """
    spec = glue_task(task)
    table = Table((*((name,) for name in spec.texts), ("index", "id")))
    numbers: list[str] = []
    found: list[TextExample] = []
    for _, (*texts, index) in table.rows(path, optional=1):
        numbers.append(index or str(len(numbers)))
        found.append(TextExample(tuple(texts), UNLABELLED))
    if not found:
        raise UserError(f"{path} holds no examples")
    return numbers, found


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= MOST_SCORE:
        raise UserError(f"{where}: the score {text!r} is not a number from 0 to {MOST_SCORE:g}")
    return score

"""GLUE (arXiv 1804.07461): the tasks that classify a sentence or a pair of sentences, from their tsv files.

Columns are found by the names in the first row, so files of the original download and re-packed ones are both read;
CoLA has no such row. Files may be compressed with gzip or xz.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilm_fast.config import ROBERTA_TYPES
from minilm_fast.data.examples import decode_line, read_lines
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer


@dataclass(frozen=True)
class GlueTask:
    """How one task's file is read and scored.

    Attributes:
        texts: columns of one or two sentences; numbers where the file names no columns.
        label: column of the label; of several the first that is there.
        labels: as they are written, in the order of their ids.
        metric: ``"accuracy"``, ``"f1"`` (of label 1) or ``"matthews"``: the measure that the benchmark reports.
    """

    texts: tuple[str, ...] | tuple[int, ...]
    label: tuple[str, ...] | tuple[int, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"


_ENTAILMENT = ("entailment", "not_entailment")
_THREE_WAY = ("entailment", "neutral", "contradiction")
GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask((3,), (1,), ("0", "1"), "matthews"),
    "mnli": GlueTask(("sentence1", "sentence2"), ("gold_label", "label"), _THREE_WAY),
    "mrpc": GlueTask(("#1 String", "#2 String"), ("Quality",), ("0", "1"), "f1"),
    "qnli": GlueTask(("question", "sentence"), ("label",), _ENTAILMENT),
    "qqp": GlueTask(("question1", "question2"), ("is_duplicate",), ("0", "1"), "f1"),
    "rte": GlueTask(("sentence1", "sentence2"), ("label",), _ENTAILMENT),
    "sst-2": GlueTask(("sentence",), ("label",), ("0", "1")),
    "wnli": GlueTask(("sentence1", "sentence2"), ("label",), ("0", "1")),
}


@dataclass(frozen=True)
class TextExample:
    """One or two texts and the id of their label."""

    texts: tuple[str, ...]
    label: int


def read_glue(path: str | Path, task: str) -> list[TextExample]:
    """The examples of a task's tsv file. Lines that are cut short are passed over with a warning.

    Args:
        task: a key of ``GLUE_TASKS``, in lower or upper case.

    Raises:
        UserError: the file cannot be read, lacks a column, has a label that the task does not know, or no example.
    """
    spec = glue_task(task)
    lines = ((f"{path}:{number}", decode_line(line, f"{path}:{number}")) for number, line in read_lines(path))
    columns: list[int] | None = None
    if isinstance(spec.texts[0], int):
        columns = [int(column) for column in (*spec.texts, spec.label[0])]
    found: list[TextExample] = []
    short = 0
    for where, line in lines:
        fields = line.rstrip("\r\n").split("\t")
        if columns is None:
            columns = _columns(fields, spec, where)
        elif len(fields) <= max(columns):
            short += 1
        else:
            *texts, label = (fields[column] for column in columns)
            if label not in spec.labels:
                raise UserError(f"{where}: the label {label!r} is not one of {', '.join(spec.labels)}")
            found.append(TextExample(tuple(texts), spec.labels.index(label)))
    if not found:
        raise UserError(f"{path} holds no examples")
    if short:
        warnings.warn(f"{path}: {short} lines have too few columns and are passed over", stacklevel=2)
    return found


def glue_task(task: str) -> GlueTask:
    """The task of a name, in lower or upper case.

    Raises:
        UserError: it is not known.
    """
    if task.lower() not in GLUE_TASKS:
        raise UserError(f"task {task!r} is not one of {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[task.lower()]


def _columns(header: list[str], spec: GlueTask, where: str) -> list[int]:
    label = next((name for name in spec.label if name in header), spec.label[0])
    for name in (*spec.texts, label):
        if name not in header:
            raise UserError(f"{where}: no column {name!r} (there are {', '.join(header)})")
    return [header.index(str(name)) for name in (*spec.texts, label)]


@dataclass(frozen=True)
class ClassificationFeature:
    """Token ids of an example, special tokens included; the token type of each; the id of the label."""

    input_ids: list[int]
    token_type_ids: list[int]
    label: int


def make_classification_features(
    examples: Sequence[TextExample], tokenizer: Tokenizer, max_seq_length: int
) -> list[ClassificationFeature]:
    """``[CLS] a [SEP] b [SEP]`` as the family writes it; of two texts the longer one is cut first.

    Args:
        max_seq_length: the longest, special tokens included.
    """
    roberta = tokenizer.model_type in ROBERTA_TYPES
    between = [tokenizer.sep_id] * (2 if roberta else 1)
    features = []
    for example in examples:
        parts = [tokenizer.encode(text) for text in example.texts]
        room = max_seq_length - 2 - (len(between) if len(parts) == 2 else 0)
        while sum(map(len, parts)) > room:
            max(reversed(parts), key=len).pop()
        ids = [tokenizer.cls_id, *parts[0]]
        if len(parts) == 2:
            ids += between
        first = len(ids)
        ids += [*(parts[1] if len(parts) == 2 else []), tokenizer.sep_id]
        second = 1 if len(parts) == 2 and not roberta else 0
        features.append(ClassificationFeature(ids, [0] * first + [second] * (len(ids) - first), example.label))
    return features

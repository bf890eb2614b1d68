"""What a configuration says of a head's labels: ``id2label``, ``label2id``, ``num_labels``, ``problem_type``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minilm_fast.config import Config
from minilm_fast.errors import UserError

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_DEFAULT_LABELS = 2
# Far above any task, so that a slip of the keyboard is an error and not all the memory.
_MOST_LABELS = 1 << 20


def label_names(config: Config) -> list[str]:
    """The labels in the order of their numbers; as in transformers ``LABEL_0`` and ``LABEL_1`` if none are named.

    Raises:
        UserError: ``id2label`` does not number its labels from 0.
    """
    names = config.extra.get("id2label")
    if not isinstance(names, Mapping):
        count = config.extra.get("num_labels", _DEFAULT_LABELS)
        if not isinstance(count, int) or not 1 <= count <= _MOST_LABELS:
            raise UserError(f"configuration: num_labels must be a number from 1 to {_MOST_LABELS}, found {count!r}")
        return _unnamed(count)
    by_number = {str(number): str(name) for number, name in names.items()}
    wanted = [str(number) for number in range(len(by_number))]
    if not wanted or set(wanted) != set(by_number):
        raise UserError(f"configuration: id2label must number its labels from 0, found {sorted(by_number)}")
    return [by_number[number] for number in wanted]


def with_labels(
    config: Config,
    *,
    num_labels: int | None = None,
    names: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> Config:
    """A configuration that names its labels; what is not given stays as it is.

    Args:
        num_labels: unless it is the number that the configuration has, the labels lose their names.
        names: of all labels, in the order of their numbers.
        problem_type: one of ``PROBLEM_TYPES``.

    Raises:
        UserError: the values contradict one another.
    """
    if num_labels is not None and num_labels < 1:
        raise UserError(f"num_labels must be positive, got {num_labels}")
    if names is not None and num_labels not in (None, len(names)):
        raise UserError(f"num_labels is {num_labels}, but {len(names)} labels are named")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise UserError(f"problem_type {problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}")
    extra = {key: value for key, value in config.extra.items() if key != "num_labels"}
    current = label_names(config)
    chosen = list(names) if names is not None else current
    if names is None and num_labels not in (None, len(current)):
        assert num_labels is not None
        chosen = _unnamed(num_labels)
    extra["id2label"] = {str(number): name for number, name in enumerate(chosen)}
    if chosen != current or not isinstance(extra.get("label2id"), Mapping):
        extra["label2id"] = {name: number for number, name in enumerate(chosen)}
    if problem_type is not None:
        extra["problem_type"] = problem_type
    return config.replace(extra=extra)


def _unnamed(count: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(count)]

"""The checkpoint that training starts from."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from minilm_fast import checkpoint
from minilm_fast.checkpoint import LoadedCheckpoint
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.modeling.classification import SequenceClassifier
from minilm_fast.modeling.heads.labels import label_names
from minilm_fast.tokenization import Tokenizer

logger = logging.getLogger(__name__)


def load_with_tokenizer(
    name: str,
    *,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    cache_dir: str | None = None,
    model_type: str | None = None,
    do_lower_case: bool | None = None,
    max_seq_length: int | None = None,
    for_training: bool = False,
) -> tuple[LoadedCheckpoint, Tokenizer]:
    """A checkpoint with its tokenizer, both checked against one another.

    Token types count as in transformers: the single row of RoBERTa is added to the positions.

    Args:
        name: folder, weights file or hub id.
        model_type: the family, where the checkpoint does not say.
        do_lower_case: None leaves it to the tokenizer's own settings.
        max_seq_length: must fit the checkpoint's positions.

    Raises:
        UserError: something is missing, or does not belong together.
    """
    resolved = checkpoint.resolve(name, config_name=config_name, tokenizer_name=tokenizer_name, cache_dir=cache_dir)
    if resolved.tokenizer is None:
        raise UserError(f"{name} holds no vocabulary: give --tokenizer_name")
    loaded = checkpoint.load(
        resolved.weights,
        config=resolved.config,
        model_type=model_type,
        for_training=for_training,
        fold_token_types=True,
    )
    tokenizer = Tokenizer.from_pretrained(
        resolved.tokenizer, model_type=loaded.config.model_type, do_lower_case=do_lower_case, cache_dir=cache_dir
    )
    checkpoint.check_tokenizer(loaded.config, loaded.tokenizer_record, tokenizer)
    positions = loaded.config.max_position_embeddings
    if max_seq_length is not None and max_seq_length > positions:
        raise UserError(f"--max_seq_length {max_seq_length}: {name} has {positions} positions")
    return loaded, tokenizer


def make_classifier(
    loaded: LoadedCheckpoint, labels: Sequence[str], names: Sequence[str], *, fresh_head: bool
) -> tuple[SequenceClassifier, list[str]]:
    """A classifier on a checkpoint's encoder, and the labels as files write them, in the order of its logits.

    A checkpoint whose labels have the task's names, in whatever order, keeps that order. Otherwise the task's order
    holds.

    Args:
        labels: of the task, as files write them; none: a regression.
        names: what they mean, as a checkpoint may name them.
        fresh_head: whether the classifier may start afresh.

    Raises:
        UserError: the checkpoint has no classifier of this task, and must have one.
    """
    order = _order_of(label_names(loaded.config), labels, names)
    kept = order if order is not None else list(range(len(labels)))
    model = SequenceClassifier.from_state(
        loaded.config,
        {**loaded.state, **loaded.extra_state},
        label_names=[names[i] for i in kept] if labels else ["LABEL_0"],
        problem_type="single_label_classification" if labels else "regression",
    )
    if not fresh_head and model.newly_initialised:
        raise UserError(f"{loaded.path}: no classifier of {max(1, len(labels))} labels: fine-tune it with --do_train")
    if not fresh_head and labels and order is None and not names_are_numbers(loaded.config):
        found = ", ".join(label_names(loaded.config))
        logger.warning("warning: the checkpoint names its labels %s; taken for %s", found, ", ".join(names))
    return model, [labels[i] for i in kept]


def names_are_numbers(config: Config) -> bool:
    """Whether a configuration gives its labels no names but ``LABEL_0``, ``LABEL_1``, ..."""
    return all(re.fullmatch(r"(LABEL_)?\d+", name) for name in label_names(config))


def _order_of(found: Sequence[str], labels: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The number in ``labels`` of each name that a checkpoint gives; None if they are other names."""
    for wanted in (names, labels):
        plain = [_plain(name) for name in wanted]
        if sorted(map(_plain, found)) == sorted(plain) and len(set(plain)) == len(plain):
            return [plain.index(_plain(name)) for name in found]
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")

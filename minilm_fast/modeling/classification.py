"""A classifier of whole sequences; ``...ForSequenceClassification`` of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.data.classification import (
    UNLABELLED,
    ClassificationFeature,
    TextExample,
    make_classification_features,
)
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads.base import HeadModel, Pooler, classifier_dropout
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.labels import label_names

Text = str | tuple[str, str]
"""What is classified: a text, or a pair of texts."""

# The special tokens of a pair, and one token.
_LEAST_LENGTH = 5
# Idle tokens are cut into sequences of at most so many, for which every model has positions.
_IDLE_LENGTH = 16


@dataclass(frozen=True)
class Classification:
    """What :meth:`SequenceClassifier.predict` says of an input.

    Attributes:
        scores: by label, in the order of the labels' numbers: probabilities that add up to 1; where the configuration's
            ``problem_type`` is ``multi_label_classification``, or there is one label, each one's own probability; for
            ``regression`` the values themselves.
    """

    scores: Mapping[str, float]

    @property
    def label(self) -> str:
        """The label with the highest score."""
        return max(self.scores, key=lambda name: self.scores[name])

    @property
    def score(self) -> float:
        """The highest score."""
        return self.scores[self.label]


@dataclass(frozen=True)
class ClassificationBatch:
    """Packed sequences with their labels.

    Attributes:
        tokens: the sequences; those after the first ``len(labels)`` are idle.
        token_type_ids: int32 ``[tokens]``.
        labels: ``[sequences that count]``, int64 numbers of labels or fp32 scores.
    """

    tokens: TokenBatch
    token_type_ids: Tensor
    labels: Tensor

    @classmethod
    def collate(
        cls, features: Sequence[ClassificationFeature], *, scores: bool = False, multiple: int = 1
    ) -> ClassificationBatch:
        """Packs features.

        Args:
            scores: whether labels are scores.
            multiple: idle sequences make the number of tokens a multiple of this one, see
                :func:`minilm_fast.data.batching.collate`.
        """
        lengths = [len(feature.input_ids) for feature in features]
        idle = -sum(lengths) % multiple
        fillers = [min(_IDLE_LENGTH, idle - start) for start in range(0, idle, _IDLE_LENGTH)]
        sequences = [feature.input_ids for feature in features] + [np.zeros(n, dtype=np.int32) for n in fillers]
        types = np.concatenate(
            [np.arange(length) >= feature.first for length, feature in zip(lengths, features, strict=True)]
            + [np.zeros(idle, dtype=bool)]
        )
        values = [feature.label for feature in features]
        labels = torch.tensor(values, dtype=torch.float32 if scores else torch.int64)
        return cls(TokenBatch.from_sequences(sequences), torch.from_numpy(types.astype(np.int32)), labels)

    def to(self, device: torch.device | str) -> ClassificationBatch:
        """The same batch on a device."""
        types, labels = (x.to(device, non_blocking=True) for x in (self.token_type_ids, self.labels))
        return replace(self, tokens=self.tokens.to(device), token_type_ids=types, labels=labels)


class SequenceClassifier(HeadModel):
    """Dense layer and activation on the first token, dropout, linear classifier (BERT, arXiv:1810.04805, section 4.1).

    The activation is tanh, for ELECTRA GELU. RoBERTa and ELECTRA also drop out what enters the dense layer. Logits are
    ``[batch, num_labels]``.
    """

    suffix = "ForSequenceClassification"
    reads_first_token = True

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        labels = len(label_names(config))
        if config.model_type in (*ROBERTA_TYPES, "electra"):
            self.classifier: nn.Module = DenseClassifier(config, labels)
            return
        self.bert.pooler = Pooler(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, labels)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a string is an iterable of strings
        self, texts: Text, *, max_seq_length: int | None = ..., batch_size: int = ..., dtype: str = ...
    ) -> Classification: ...

    @overload
    def predict(
        self, texts: Iterable[Text], *, max_seq_length: int | None = ..., batch_size: int = ..., dtype: str = ...
    ) -> list[Classification]: ...

    def predict(
        self,
        texts: Text | Iterable[Text],
        *,
        max_seq_length: int | None = None,
        batch_size: int = 32,
        dtype: str = "fp32",
    ) -> Any:
        """Classifies texts, or pairs of texts, where the model is: on a CPU or a GPU.

        Args:
            texts: one text, one pair (a tuple of two strings), or any number of either.
            max_seq_length: tokens of an input, special ones included; of longer ones the end is cut off, of a pair the
                longer text first. By default as many as the model has positions.
            batch_size: inputs computed together; changes nothing but the speed.
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"`` weights of the linear layers, see
                :meth:`HeadModel.packed`.

        Returns:
            a :class:`Classification`, of several inputs a list of them in their order.

        Raises:
            UserError: an argument is out of range, or the model has no tokenizer.
        """
        if _is_text(texts):
            return self.predict([texts], max_seq_length=max_seq_length, batch_size=batch_size, dtype=dtype)[0]
        positions = self.config.max_position_embeddings
        length = positions if max_seq_length is None else max_seq_length
        if not _LEAST_LENGTH <= length <= positions:
            raise UserError(f"max_seq_length must be from {_LEAST_LENGTH} to the model's {positions}, got {length}")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        features = make_classification_features(_examples(texts), self.tokenizer, length)
        packed, found = self.packed(dtype), []
        for start in range(0, len(features), batch_size):
            chosen = range(start, min(start + batch_size, len(features)))
            batch = ClassificationBatch.collate([features[i] for i in chosen]).to(self.device)
            found += self._classifications(packed(batch.tokens, token_type_ids=batch.token_type_ids))
        return found

    def _classifications(self, logits: Tensor) -> list[Classification]:
        """As pipelines of transformers turn logits into scores."""
        kind = self.config.extra.get("problem_type")
        if kind == "regression":
            scores = logits
        elif kind == "multi_label_classification" or logits.shape[1] == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(1)
        rows = scores.tolist()
        return [Classification(dict(zip(self.labels, row, strict=True))) for row in rows]

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`; ``hidden`` is ``[batch, hidden]``."""
        first = hidden
        if isinstance(self.classifier, nn.Linear):
            first = self.dropout(self.get_submodule("bert.pooler")(first))
        logits: Tensor = self.classifier(first)
        return logits


def _is_text(given: object) -> TypeGuard[Text]:
    return isinstance(given, str) or (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, str) for part in given)
    )


def _examples(texts: Iterable[Text]) -> list[TextExample]:
    examples = []
    for number, text in enumerate(texts):
        if not _is_text(text):
            raise UserError(f"text {number} must be a string or a tuple of two, got {text!r:.60}")
        examples.append(TextExample((text,) if isinstance(text, str) else text, UNLABELLED))
    return examples


class DenseClassifier(nn.Module):
    """The head of RoBERTa and ELECTRA: dropout, dense layer, activation, dropout, linear layer."""

    def __init__(self, config: Config, labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = F.gelu if config.model_type == "electra" else torch.tanh
        self.dropout = classifier_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, labels)

    def forward(self, first: Tensor) -> Tensor:
        """``[batch, hidden]`` -> ``[batch, labels]``."""
        logits: Tensor = self.out_proj(self.dropout(self.activation(self.dense(self.dropout(first)))))
        return logits

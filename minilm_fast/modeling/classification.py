"""A classifier of whole sequences; ``...ForSequenceClassification`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.data.classification import ClassificationFeature
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.modeling.heads.base import HeadModel, Pooler, classifier_dropout
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.labels import label_names

# Idle tokens are cut into sequences of at most so many, for which every model has positions.
_IDLE_LENGTH = 16


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

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        labels = len(label_names(config))
        if config.model_type in (*ROBERTA_TYPES, "electra"):
            self.classifier: nn.Module = DenseClassifier(config, labels)
            return
        self.bert.pooler = Pooler(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, labels)

    def encode(self, batch: HeadInput) -> Tensor:
        """The encoder's output for the first tokens ``[batch, hidden]``: only these go through the last layer."""
        return super().encode(_first_comes_last(batch))

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`; ``hidden`` is ``[batch, hidden]``."""
        first = hidden
        if isinstance(self.classifier, nn.Linear):
            first = self.dropout(self.get_submodule("bert.pooler")(first))
        logits: Tensor = self.classifier(first)
        return logits


def _first_comes_last(batch: HeadInput) -> HeadInput:
    """The same sequences with the first token moved behind the others, which alone asks.

    Every token sees every other, and each keeps its position, so nothing depends on the order in memory; but the rows
    that ask are the last ones of a sequence.
    """
    tokens = batch.tokens
    bounds = tokens.layout.cu_seqlens.long()
    place = torch.arange(1, tokens.layout.total + 1, device=bounds.device)
    place[bounds[1:] - 1] = bounds[:-1]
    layout = tokens.layout.with_queries(torch.ones(len(bounds) - 1, dtype=torch.int32, device=bounds.device))
    moved = replace(tokens, input_ids=tokens.input_ids[place], position_ids=tokens.position_ids[place], layout=layout)
    return HeadInput(moved, batch.token_type_ids[place])


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

"""A label for every token; ``...ForTokenClassification`` of transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.modeling.heads.base import HeadModel, classifier_dropout
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.labels import label_names

IGNORED = -100
"""Label of a token that has none, as in transformers."""


class TokenClassifier(HeadModel):
    """Dropout and a linear layer on every token (BERT, arXiv:1810.04805, section 5.3).

    Logits are ``[tokens, num_labels]`` for a packed batch and ``[batch, length, num_labels]`` for a padded one, there 0
    at padding.
    """

    suffix = "ForTokenClassification"

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, len(label_names(config)))

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`."""
        return batch.spread(self.classifier(self.dropout(hidden)))

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens whose label is not -100, fp32.

        Args:
            labels: int64, the shape of ``logits`` without the last dimension.
        """
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)

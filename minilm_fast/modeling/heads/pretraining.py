"""The heads of pre-training: BERT's (``...ForPreTraining``, ``...ForNextSentencePrediction``) and ELECTRA's.

In a next-sentence prediction label 0 means that the second text follows the first one, 1 that it is any other, as in
transformers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.modeling.encoder import activated, activation
from minilm_fast.modeling.heads.base import BERT_TYPES, HeadModel, Pooler
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.masked_lm import MaskedLM


class PreTrainingLogits(NamedTuple):
    """What :class:`PreTraining` computes, under transformers' names.

    Attributes:
        prediction_logits: over the vocabulary, as of :class:`MaskedLM`.
        seq_relationship_logits: ``[batch, 2]``.
    """

    prediction_logits: Tensor
    seq_relationship_logits: Tensor


class NextSentenceHead(nn.Module):
    """Holds the linear layer under the name that checkpoints use."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class NextSentencePredictor(HeadModel):
    """Whether the second text follows the first one (BERT, arXiv:1810.04805, section 3.1).

    The pooled first token and a linear layer; logits are ``[batch, 2]``.
    """

    suffix = "ForNextSentencePrediction"
    labelled = False
    model_types = BERT_TYPES
    reads_first_token = True

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.bert.pooler = Pooler(config)
        self.cls = NextSentenceHead(config)

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`; ``hidden`` is ``[batch, hidden]``."""
        logits: Tensor = self.cls.seq_relationship(self.get_submodule("bert.pooler")(hidden))
        return logits

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of ``labels`` int64 ``[batch]``, fp32."""
        return F.cross_entropy(logits.float(), labels)


class PreTraining(MaskedLM):
    """Both heads of BERT's pre-training on one encoder (BERT, arXiv:1810.04805, section 3.1).

    Calling it gives :class:`PreTrainingLogits`.
    """

    suffix = "ForPreTraining"
    model_types = BERT_TYPES

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        super().build(config)
        self.bert.pooler = Pooler(config)
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    def head(self, hidden: Tensor, batch: HeadInput) -> PreTrainingLogits:
        """See :class:`HeadModel`."""
        return PreTrainingLogits(batch.spread(self.token_logits(hidden)), self._relationship(hidden, batch))

    def pretraining_loss(
        self, batch: HeadInput, predicted: Tensor, labels: Tensor, next_sentence_labels: Tensor
    ) -> Tensor:
        """The sum of :meth:`masked_loss` and the mean cross-entropy of the next sentence, fp32.

        Args:
            batch, predicted, labels: as for :meth:`masked_loss`.
            next_sentence_labels: int64 ``[batch]``.
        """
        hidden = self.encode(batch)
        relationship = F.cross_entropy(self._relationship(hidden, batch).float(), next_sentence_labels)
        return self.mean_loss(hidden[predicted], labels) + relationship

    def _relationship(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        first = hidden[batch.tokens.layout.cu_seqlens[:-1].long()]
        logits: Tensor = self.cls.get_submodule("seq_relationship")(self.get_submodule("bert.pooler")(first))
        return logits


class ReplacedTokenDetector(HeadModel):
    """ELECTRA's discriminator: whether a token was exchanged for another one (arXiv:2003.10555, section 2).

    Logits are ``[tokens]`` for a packed batch and ``[batch, length]`` for a padded one, there 0 at padding; above 0 the
    token is held for a replaced one. It is ``ElectraForPreTraining`` of transformers.
    """

    suffix = "ForPreTraining"
    labelled = False
    model_types = ("electra",)

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.discriminator_predictions = DiscriminatorPredictions(config)

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`."""
        return batch.spread(self.discriminator_predictions(hidden))

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean binary cross-entropy of the tokens, fp32.

        Args:
            labels: 1 for a replaced token, 0 for an original one; the shape of ``logits``.
            attention_mask: of a padded batch, 0 at padding.
        """
        if attention_mask is not None:
            tokens = attention_mask.bool()
            logits, labels = logits[tokens], labels[tokens]
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


class DiscriminatorPredictions(nn.Module):
    """Dense layer, activation and a linear layer with one output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = None if config.hidden_act == "gelu" else activation(config.hidden_act)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> ``[tokens]``."""
        logits: Tensor = self.dense_prediction(activated(self.dense, self.activation, hidden)).squeeze(-1)
        return logits

"""Logits over the vocabulary for every token; ``...ForMaskedLM`` of transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.layouts import DECODER_WEIGHT, WORD_EMBEDDINGS
from minilm_fast.modeling.heads.base import HeadModel
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.seq2seq import Head


class MaskedLM(HeadModel):
    """The masked-language-model head (BERT, arXiv:1810.04805, section 3.1).

    Logits are ``[tokens, vocab_size]`` for a packed batch and ``[batch, length, vocab_size]`` for a padded one, there 0
    at padding. :meth:`masked_loss` never holds them.
    """

    suffix = "ForMaskedLM"
    labelled = False

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.cls = Head(config)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Weights under canonical names, the tied output projection included."""
        state = super().checkpoint_state()
        state.setdefault(DECODER_WEIGHT, state[WORD_EMBEDDINGS])
        return state

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`."""
        predictions = self.cls.predictions
        matrix = predictions.matrix(self.bert.embeddings.word_embeddings.weight)
        return batch.spread(F.linear(predictions.transform(hidden), matrix, predictions.bias))

    def masked_loss(self, batch: HeadInput, predicted: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of some tokens, fp32; the logits exist a block at a time.

        Args:
            batch: from :meth:`HeadModel.read`.
            predicted: int64 ``[rows]``, their places among the packed tokens.
            labels: int64 ``[rows]``.
        """
        predictions = self.cls.predictions
        matrix = predictions.matrix(self.bert.embeddings.word_embeddings.weight)
        rows = predictions.transform(self.encode(batch)[predicted])
        losses = ops.label_smoothed_cross_entropy(rows, matrix, predictions.bias, labels, 0.0)
        return losses.sum() / max(1, len(labels))

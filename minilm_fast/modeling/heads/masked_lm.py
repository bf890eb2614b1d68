"""Logits over the vocabulary for every token; ``...ForMaskedLM`` and ``...ForCausalLM`` of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.layouts import DECODER_WEIGHT, WORD_EMBEDDINGS
from minilm_fast.modeling.heads.base import HeadModel
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.seq2seq import Head
from minilm_fast.ops.layout import SequenceLayout


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

    def head(self, hidden: Tensor, batch: HeadInput) -> Any:
        """See :class:`HeadModel`."""
        return batch.spread(self.token_logits(hidden))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden]`` -> ``[rows, vocab_size]``."""
        predictions = self.cls.predictions
        matrix = predictions.matrix(self.bert.embeddings.word_embeddings.weight)
        return F.linear(predictions.transform(hidden), matrix, predictions.bias)

    def masked_loss(self, batch: HeadInput, predicted: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of some tokens, fp32; the logits exist a block at a time.

        Args:
            batch: from :meth:`HeadModel.read`.
            predicted: int64 ``[rows]``, their places among the packed tokens.
            labels: int64 ``[rows]``.
        """
        return self.mean_loss(self.encode(batch)[predicted], labels)

    def mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the encoder's output ``[rows, hidden]``, fp32; 0 of no rows."""
        predictions = self.cls.predictions
        matrix = predictions.matrix(self.bert.embeddings.word_embeddings.weight)
        rows = predictions.transform(hidden)
        losses = ops.label_smoothed_cross_entropy(rows, matrix, predictions.bias, labels, 0.0)
        return losses.sum() / max(1, len(labels))


class CausalLM(MaskedLM):
    """The same head where a token sees itself and those before it only; ``...LMHeadModel`` or ``...ForCausalLM``.

    Logits are those of the token that follows.

    Raises:
        UserError: the configuration asks for cross-attention.
    """

    suffix = "ForCausalLM"
    causal = True

    def __init__(self, config: Config) -> None:
        if config.extra.get("add_cross_attention"):
            raise UserError("configuration: add_cross_attention is set; CausalLM has no other sequence to attend to")
        super().__init__(config.replace(extra={**config.extra, "is_decoder": True}))

    @property
    def architecture(self) -> str:
        """See :class:`HeadModel`."""
        found = super().architecture
        return "BertLMHeadModel" if found == "BertForCausalLM" else found

    def read(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> HeadInput:
        """See :class:`HeadModel`; the layout is causal."""
        batch = super().read(input_ids, attention_mask, token_type_ids, position_ids)
        layout = batch.tokens.layout
        causal = SequenceLayout.causal(layout.cu_seqlens.diff().tolist(), layout.cu_seqlens.device)
        return replace(batch, tokens=replace(batch.tokens, layout=causal))

    def causal_loss(self, batch: HeadInput) -> Tensor:
        """Mean cross-entropy of each sequence's tokens but its first, fp32; the logits exist a block at a time.

        Args:
            batch: from :meth:`read`.
        """
        layout = batch.tokens.layout
        follows = torch.ones(layout.total, dtype=torch.bool, device=layout.cu_seqlens.device)
        follows[layout.cu_seqlens[:-1].long()] = False
        places = follows.nonzero().flatten()
        return self.masked_loss(batch, places - 1, batch.tokens.input_ids[places].long())

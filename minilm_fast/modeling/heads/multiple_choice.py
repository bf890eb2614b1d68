"""A score for each of several sequences that belong together; ``...ForMultipleChoice`` of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import activation
from minilm_fast.modeling.heads.base import HeadModel, Pooler, classifier_dropout, dropout_setting
from minilm_fast.modeling.heads.inputs import HeadInput


class MultipleChoice(HeadModel):
    """The pooled first token, dropout and a linear layer with one output.

    Logits are ``[questions, choices]``. A padded batch is ``[questions, choices, length]``; a packed one holds the
    choices of the first question, then those of the second, and ``choices`` says how many each has.
    """

    suffix = "ForMultipleChoice"
    labelled = False
    reads_first_token = True

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.dropout = classifier_dropout(config)
        if config.model_type == "electra":
            self.sequence_summary = SequenceSummary(config)
            self.dropout = nn.Dropout(0.0)
        else:
            self.bert.pooler = Pooler(config)
        if config.model_type in ROBERTA_TYPES:
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        encode: Callable[[HeadInput], Tensor] | None = None,
        choices: int | None = None,
    ) -> Tensor:
        """See the class.

        Raises:
            UserError: the batch cannot be split into questions.
        """
        if isinstance(input_ids, TokenBatch):
            sequences = input_ids.layout.cu_seqlens.numel() - 1
            if choices is None or choices < 1 or sequences % choices:
                raise UserError(f"{sequences} sequences cannot be {choices} choices each")
            flat: list[Tensor | None] = [attention_mask, token_type_ids, position_ids]
        else:
            if input_ids.dim() != 3:
                raise UserError(f"input_ids must be [questions, choices, length], got {list(input_ids.shape)}")
            choices = input_ids.shape[1]
            input_ids = input_ids.flatten(0, 1)
            flat = [None if x is None else x.flatten(0, -2) for x in (attention_mask, token_type_ids, position_ids)]
        return super().forward(input_ids, *flat, encode=encode).view(-1, choices)

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`; ``hidden`` is ``[sequences, hidden]``."""
        summary = "sequence_summary" if self.config.model_type == "electra" else "bert.pooler"
        pooled = self.get_submodule(summary)(hidden)
        return self.classifier(self.dropout(pooled))

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the right choices ``labels`` int64 ``[questions]``, fp32."""
        return F.cross_entropy(logits.float(), labels)


class SequenceSummary(nn.Module):
    """ELECTRA's summary of the first token: dropout, dense layer, activation, dropout, as ``config.json`` says.

    Raises:
        UserError: the configuration asks for a summary of anything but the first token.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        kind = config.extra.get("summary_type", "first")
        if kind != "first" or not config.extra.get("summary_use_proj", True):
            raise UserError(f"configuration: summary_type {kind!r} is not supported, only 'first' with a projection")
        self.summary = nn.Linear(config.hidden_size, config.hidden_size)
        name = config.extra.get("summary_activation", "gelu")
        self.activation = torch.tanh if name == "tanh" else activation(name) if name else nn.Identity()
        self.first_dropout = nn.Dropout(dropout_setting(config, "summary_first_dropout", 0.0))
        self.last_dropout = nn.Dropout(dropout_setting(config, "summary_last_dropout", 0.1))

    def forward(self, first: Tensor) -> Tensor:
        """``[batch, hidden]`` -> the same shape."""
        return self.last_dropout(self.activation(self.summary(self.first_dropout(first))))

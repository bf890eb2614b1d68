"""What heads read: packed sequences, or a padded batch that is packed first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.ops.layout import SequenceLayout


@dataclass(frozen=True)
class HeadInput:
    """Packed tokens, and where they came from.

    Attributes:
        tokens: the tokens that count.
        token_type_ids: int32 ``[tokens]``.
        place: int64 ``[tokens]``, the place of each in the flattened padded batch; None if it came packed.
        shape: ``(batch, length)`` of the padded batch, or ``(0, 0)``.
    """

    tokens: TokenBatch
    token_type_ids: Tensor
    place: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @classmethod
    def from_packed(cls, config: Config, tokens: TokenBatch, token_type_ids: Tensor | None = None) -> HeadInput:
        """Sequences that come without padding.

        Raises:
            UserError: a sequence is longer than the table of positions.
        """
        longest, limit = tokens.layout.max_seqlen, config.max_position_embeddings
        if longest > limit:
            raise UserError(f"a sequence of {longest} tokens is longer than the model's {limit} positions")
        types = torch.zeros_like(tokens.input_ids) if token_type_ids is None else token_type_ids
        return cls(tokens, types)

    @classmethod
    def from_padded(
        cls,
        config: Config,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> HeadInput:
        """Packs what transformers' models take; positions are numbered as theirs.

        That is, from the first column on for BERT and ELECTRA, and over the tokens that are not padding for RoBERTa
        and XLM-R.

        Args:
            input_ids: ``[batch, length]``.
            attention_mask: the same shape; 0 where there is padding, which may be anywhere. None: no padding.
            token_type_ids: the same shape; by default 0. Models without token types ignore them.
            position_ids: the same shape, counted from 0 for every family; by default as said above.

        Raises:
            UserError: shapes differ, a row has no token, a position is outside the table, or a RoBERTa has its padding
                token where the mask says that there is none.
        """
        if input_ids.dim() != 2:
            raise UserError(f"input_ids must be [batch, length], got {list(input_ids.shape)}")
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        for name, tensor in given.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                raise UserError(f"{name} must be {list(input_ids.shape)} like input_ids, got {list(tensor.shape)}")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = mask.sum(1).tolist()
        if 0 in lengths:
            raise UserError(f"attention_mask: row {lengths.index(0)} has no token")
        place = mask.flatten().nonzero().flatten()

        def packed(tensor: Tensor) -> Tensor:
            return tensor.flatten()[place].to(torch.int32)

        positions = _positions(config, input_ids, mask) if position_ids is None else position_ids
        tokens = TokenBatch(packed(input_ids), packed(positions), SequenceLayout.bidirectional(lengths, mask.device))
        _check_positions(config, tokens)
        types = torch.zeros_like(tokens.input_ids) if token_type_ids is None else packed(token_type_ids)
        return cls(tokens, types, place, (input_ids.shape[0], input_ids.shape[1]))

    def first_asks(self) -> HeadInput:
        """The same sequences with the first token moved behind the others, which alone asks.

        Every token sees every other, and each keeps its position, so nothing depends on the order in memory; but the
        rows that ask are the last ones of a sequence.
        """
        tokens = self.tokens
        bounds = tokens.layout.cu_seqlens.long()
        place = torch.arange(1, tokens.layout.total + 1, device=bounds.device)
        place[bounds[1:] - 1] = bounds[:-1]
        layout = tokens.layout.with_queries(torch.ones(len(bounds) - 1, dtype=torch.int32, device=bounds.device))
        ids, positions = tokens.input_ids[place], tokens.position_ids[place]
        return HeadInput(
            replace(tokens, input_ids=ids, position_ids=positions, layout=layout), self.token_type_ids[place]
        )

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """``[tokens, ...]`` as the input was: ``[batch, length, ...]`` with ``fill`` at padding, or unchanged."""
        if self.place is None:
            return values
        batch, length = self.shape
        rows = values.new_full((batch * length, *values.shape[1:]), fill)
        return rows.index_copy(0, self.place, values).unflatten(0, (batch, length))


def _positions(config: Config, input_ids: Tensor, mask: Tensor) -> Tensor:
    if config.model_type not in ROBERTA_TYPES:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    counted = input_ids != config.pad_token_id
    if bool((mask & ~counted).any()):
        raise UserError(
            f"input_ids holds the padding token {config.pad_token_id} where attention_mask says that there is no "
            f"padding (without a mask there is none)"
        )
    return counted.cumsum(1) - 1


def _check_positions(config: Config, tokens: TokenBatch) -> None:
    low, high = (int(x) for x in torch.aminmax(tokens.position_ids)) if tokens.position_ids.numel() else (0, 0)
    if low < 0 or high >= config.max_position_embeddings:
        raise UserError(
            f"position {low if low < 0 else high} is outside the model's {config.max_position_embeddings} positions"
        )

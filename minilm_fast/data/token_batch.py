"""Packed batches of token sequences, and their padded form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minilm_fast.ops.layout import SequenceLayout


@dataclass(frozen=True)
class TokenBatch:
    """Sequences one after the other, without padding.

    Attributes:
        input_ids, position_ids: int32 ``[layout.total]``; positions count from 0 in each sequence.
        layout: where the sequences are and who sees whom.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: SequenceLayout

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int] | np.ndarray]) -> TokenBatch:
        """A batch of bidirectional sequences on the CPU.

        Args:
            sequences: the ids of each, special tokens included.
        """
        parts = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        layout = SequenceLayout.bidirectional([len(part) for part in parts])
        positions = [np.arange(len(part), dtype=np.int32) for part in parts]
        return cls(_joined(parts), _joined(positions), layout)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> TokenBatch:
        """The tokens of a padded batch of bidirectional sequences.

        Args:
            input_ids: ``[batch, length]``.
            attention_mask: the same shape; padding is 0 and comes after the tokens.

        Raises:
            ValueError: shapes differ, or padding comes before a token.
        """
        if input_ids.shape != attention_mask.shape or input_ids.dim() != 2:
            raise ValueError(
                f"input_ids and attention_mask must be one shape [batch, length], got {tuple(input_ids.shape)} and "
                f"{tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        positions = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32).expand_as(mask)
        if not torch.equal(mask, positions < lengths[:, None]):
            raise ValueError("attention_mask: padding must come after the tokens of a sequence")
        layout = SequenceLayout.bidirectional(lengths.tolist(), device=mask.device)
        return cls(input_ids[mask].to(torch.int32), positions[mask], layout)

    def padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``[batch, layout.max_seqlen]``.

        Raises:
            ValueError: the sequences are not bidirectional, which a padded batch cannot say.
        """
        if bool(self.layout.segments[:, 1:].any()):
            raise ValueError("only bidirectional sequences can be padded")
        lengths = self.layout.cu_seqlens.diff()
        mask = torch.arange(self.layout.max_seqlen, device=lengths.device) < lengths[:, None]
        ids = torch.full(mask.shape, pad_id, dtype=torch.int64, device=lengths.device)
        ids[mask] = self.input_ids.long()
        return ids, mask.long()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            layout=self.layout.to(device),
        )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32))

"""Samples put together into packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilm_fast.data.pseudo_masking import Sample
from minilm_fast.ops.layout import SequenceLayout


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after the other, without padding, and what is to be predicted.

    Attributes:
        input_ids, position_ids: int32 ``[tokens]``. In a sequence come its source, target and pseudo tokens; a pseudo
            token has the position of its target token.
        layout: lengths and attention mask. The rows that predict are among its queries: the pseudo tokens of a
            sequence, or its target tokens where it has no pseudo tokens.
        predicted: int64 ``[rows]``, which of the queries predict.
        labels: int64 ``[rows]``.
        weights: fp32 ``[rows]``, the weight of each row's loss.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: SequenceLayout
    predicted: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.layout.total

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        fields = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "predicted", "labels", "weights")
        }
        return replace(self, layout=self.layout.to(device), **fields)


def collate(samples: Sequence[Sample]) -> PackedBatch:
    """Packs samples; every label has weight 1.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    ids: list[int] = []
    positions: list[int] = []
    predicted: list[int] = []
    labels: list[int] = []
    queries = 0
    for sample in samples:
        source, target, pseudo = len(sample.source), len(sample.target), len(sample.pseudo)
        ids += sample.source
        ids += sample.target
        ids += sample.pseudo
        positions += range(source + target)
        positions += range(source, source + pseudo)
        predicted += [queries + offset for offset in sample.predicted]
        labels += sample.labels
        queries += pseudo or target
    layout = SequenceLayout.from_counts(
        [len(s.source) for s in samples], [len(s.target) for s in samples], [len(s.pseudo) for s in samples]
    ).with_queries([len(s.pseudo) or len(s.target) for s in samples])
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.int32),
        position_ids=torch.tensor(positions, dtype=torch.int32),
        layout=layout,
        predicted=torch.tensor(predicted),
        labels=torch.tensor(labels),
        weights=torch.ones(len(labels)),
    )

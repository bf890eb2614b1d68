"""Samples put together into packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilm_fast.data.masking import Sample
from minilm_fast.ops.layout import SequenceLayout


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after the other, without padding, and what is to be predicted.

    Attributes:
        input_ids, position_ids: int32 ``[layout.total]``. In a sequence come its source, target and pseudo tokens; a
            pseudo token has the position of its target token.
        layout: lengths and attention mask. The rows that predict are among its queries: the pseudo tokens of a
            sequence, or its target tokens where it has no pseudo tokens.
        predicted: int64 ``[rows]``, which of the queries predict.
        labels: int64 ``[rows]``.
        weights: fp32 ``[rows]``, the weight of each row's loss.
        tokens: number of the samples' tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: SequenceLayout
    predicted: Tensor
    labels: Tensor
    weights: Tensor
    tokens: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device."""
        fields = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "predicted", "labels", "weights")
        }
        return replace(self, layout=self.layout.to(device), **fields)


def _missing(count: int, multiple: int) -> int:
    return -count % multiple


def collate(samples: Sequence[Sample], multiple: int = 1) -> PackedBatch:
    """Packs samples; every label has weight 1.

    Args:
        multiple: the numbers of tokens, of queries and of predicted rows become multiples of this one. What is missing
            is one more sequence of token 0 at the end, whose rows predict with weight 0. Libraries that generate code
            for each shape (oneDNN for bf16 products: milliseconds a shape) then find most of it made already.

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
    tokens, rows = len(ids), len(labels)
    counts = [(len(s.source), len(s.target), len(s.pseudo), len(s.pseudo) or len(s.target)) for s in samples]
    idle_rows = _missing(rows, multiple)
    asked = _missing(queries, multiple)
    if idle_rows and not asked:
        asked = multiple
    filler = _missing(tokens, multiple)
    if filler < asked:
        filler += multiple
    if filler:
        counts.append((filler, 0, 0, asked))
        ids += [0] * filler
        positions += [0] * filler
        # The last query is one of the filler's wherever there are idle rows.
        predicted += [queries + asked - 1] * idle_rows
        labels += [0] * idle_rows
    weights = torch.ones(rows + idle_rows)
    weights[rows:] = 0.0
    source_counts, target_counts, pseudo_counts, query_counts = zip(*counts, strict=True)
    layout = SequenceLayout.from_counts(source_counts, target_counts, pseudo_counts).with_queries(query_counts)
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.int32),
        position_ids=torch.tensor(positions, dtype=torch.int32),
        layout=layout,
        predicted=torch.tensor(predicted),
        labels=torch.tensor(labels),
        weights=weights,
        tokens=tokens,
    )

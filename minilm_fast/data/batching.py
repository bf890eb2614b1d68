"""Order of the batches of an epoch, and samples put together into tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilm_fast.data.pseudo_masking import Sample


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Arguments of :meth:`minilm_fast.modeling.seq2seq.Seq2SeqModel.forward`, in their order.

    Every row of ``input_ids`` and ``position_ids`` (int64 ``[batch, length]``) is source, target, pseudo tokens,
    padding; ``segments`` int64 ``[batch, 3]`` counts them. ``predicted``, ``labels`` (int64) and ``weights`` (fp32)
    are ``[batch, rows]``.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predicted: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.segments.sum())

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields as positional arguments."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def collate(samples: Sequence[Sample], pad_id: int) -> Seq2SeqBatch:
    """Batch of pseudo-masked samples; a pseudo token has the position of its target token."""
    length = max(sample.length for sample in samples)
    rows = max(len(sample.labels) for sample in samples)
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    predicted = torch.zeros(len(samples), rows, dtype=torch.int64)
    labels = torch.zeros_like(predicted)
    weights = torch.zeros(len(samples), rows)
    segments = torch.tensor([[len(s.source), len(s.labels), len(s.labels)] for s in samples])
    for i, sample in enumerate(samples):
        source, target = len(sample.source), len(sample.labels)
        input_ids[i, : sample.length] = torch.tensor([*sample.source, *sample.target, *sample.pseudo])
        position_ids[i, : source + target] = torch.arange(source + target)
        position_ids[i, source + target : sample.length] = torch.arange(source, source + target)
        predicted[i, :target] = torch.arange(source + target, sample.length)
        labels[i, :target] = torch.tensor(sample.labels)
        weights[i, :target] = 1.0
    return Seq2SeqBatch(input_ids, position_ids, segments, predicted, labels, weights)


def sequential_batch(number: int, batch_size: int, examples: int) -> list[int]:
    """Indices of batch ``number`` when the examples are gone through in order, again and again."""
    start = number * batch_size
    return [index % examples for index in range(start, start + batch_size)]


class LengthGroupedBatches:
    """Batches of about equal lengths.

    Each epoch shuffles the examples, sorts each stretch of ``batches_per_group`` batches by length, cuts it into
    batches and shuffles these. An epoch depends on the seed and its number only, so a batch can be asked for by its
    number. The last examples that do not fill a batch are left out of the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, batches_per_group: int = 64) -> None:
        self.lengths = lengths
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.group = self.batch_size * batches_per_group
        self._epoch = -1
        self._batches: list[list[int]] = []

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size = self.batch_size
        batches = []
        for start in range(0, len(order), self.group):
            group = sorted(order[start : start + self.group], key=self.lengths.__getitem__)
            batches += [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        rng.shuffle(batches)
        return batches

    def __getitem__(self, number: int) -> list[int]:
        per_epoch = len(self._batches) or len(self._make_epoch(0))
        epoch, index = divmod(number, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._make_epoch(epoch)
        return self._batches[index]

"""Which examples make up which batch."""

from __future__ import annotations

import random
from collections.abc import Sequence


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

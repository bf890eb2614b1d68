"""Which examples make up which batch.

An order is asked for a batch by its number, so a run can go on anywhere, and it depends on nothing but its arguments,
so every rank has the same one. Numbers count the batches of all ranks (:func:`batch_number`): ranks get equally many,
and an epoch may end in the middle of a step.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from minilm_fast.errors import UserError


class BatchOrder(Protocol):
    """An endless sequence of batches of example indices."""

    def __getitem__(self, number: int) -> list[int]:
        """Indices of batch ``number``, counted from 0."""

    def batches_in(self, epochs: int) -> int:
        """How many batches the first ``epochs`` epochs take."""


def batch_number(step: int, micro_batch: int, accumulation: int, rank: int = 0, world_size: int = 1) -> int:
    """Number of the batch that a rank works on.

    A step takes ``accumulation * world_size`` consecutive batches, so one process that accumulates them all sees
    the same step.
    """
    return (step * accumulation + micro_batch) * world_size + rank


def sequential_batch(number: int, batch_size: int, examples: int) -> list[int]:
    """Indices of batch ``number`` when the examples are gone through in order, again and again."""
    start = number * batch_size
    return [index % examples for index in range(start, start + batch_size)]


class SequentialBatches:
    """The original's order: the examples, shuffled once before training, in turn, again and again.

    Every batch is full; the one at the end of an epoch goes on with the first examples.
    """

    def __init__(self, examples: int, batch_size: int) -> None:
        self.examples = examples
        self.batch_size = batch_size

    def __getitem__(self, number: int) -> list[int]:
        return sequential_batch(number, self.batch_size, self.examples)

    def batches_in(self, epochs: int) -> int:
        """Batches until every example was used ``epochs`` times."""
        return math.ceil(self.examples * epochs / self.batch_size)


class _EpochBatches:
    """Batches that are drawn anew for every epoch, which goes through all examples once."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths):
            raise ValueError("there are no examples to put in order")
        self.seed = seed
        self._starts = [0]
        self._epoch = -1
        self._order = self._bounds = self._turns = np.zeros(0, dtype=np.int64)

    def __getitem__(self, number: int) -> list[int]:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + self._count(len(self._starts) - 1))
        epoch = bisect.bisect_right(self._starts, number) - 1
        self._load(epoch)
        batch = self._turns[number - self._starts[epoch]]
        return self._order[self._bounds[batch] : self._bounds[batch + 1]].tolist()

    def batches_in(self, epochs: int) -> int:
        """How many batches the first ``epochs`` epochs take."""
        while len(self._starts) <= epochs:
            self._starts.append(self._starts[-1] + self._count(len(self._starts) - 1))
        return self._starts[epochs]

    def _count(self, epoch: int) -> int:
        self._load(epoch)
        return len(self._turns)

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        # The one generator whose streams numpy keeps as they are from version to version.
        rng = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        self._order, self._bounds = self._draw(rng)
        self._turns = rng.permutation(len(self._bounds) - 1)
        self._epoch = epoch

    def _draw(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """The examples of an epoch in order, and the ``batches + 1`` places at which batches begin and end."""
        raise NotImplementedError

    def _by_length(self, rng: np.random.RandomState, groups: int) -> np.ndarray:
        """Shuffled examples, sorted within ``groups`` stretches and begun at a random place of the round.

        Stretches go upwards and downwards in turn, so neighbours have about equal lengths throughout. As every
        example is as likely at any place, chance alone decides which batch is smaller than the others.
        """
        order = rng.permutation(len(self.lengths))
        stretches = np.array_split(order, groups)
        for i, stretch in enumerate(stretches):
            stretch[:] = stretch[np.argsort(self.lengths[stretch], kind="stable")][:: 1 - 2 * (i % 2)]
        return np.roll(order, -rng.randint(len(order)))


def _sums(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


class LengthGroupedBatches(_EpochBatches):
    """Batches of equally many examples of about equal lengths.

    Each epoch shuffles the examples, sorts stretches of about ``batches_per_group`` batches by length, cuts the round
    into batches and shuffles these. Every example is in exactly one batch of an epoch. Sizes that do not come out even
    differ by one, and chance alone decides who is in a smaller batch, so no length is favoured.

    Args:
        lengths: tokens of every example.
        batch_size: most examples in a batch.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, batches_per_group: int = 64
    ) -> None:
        super().__init__(lengths, seed)
        self.batches = math.ceil(len(self.lengths) / batch_size)
        self.batches_per_group = batches_per_group

    def _count(self, epoch: int) -> int:
        return self.batches

    def _draw(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        size, larger = divmod(len(self.lengths), self.batches)
        sizes = np.full(self.batches, size)
        sizes[:larger] += 1
        rng.shuffle(sizes)
        groups = math.ceil(self.batches / self.batches_per_group)
        return self._by_length(rng, groups), _sums(sizes)


class TokenBudgetBatches(_EpochBatches):
    """Batches of as many examples as fit into a number of tokens.

    As :class:`LengthGroupedBatches`, but the round is cut into batches that are as full as they can be; only the last
    one is smaller. How many batches an epoch has varies a little.

    Args:
        lengths: tokens of every example, as it is packed.
        max_tokens: most tokens in a batch.
        by_length: False cuts the shuffled examples without sorting them.

    Raises:
        UserError: an example is longer than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        seed: int,
        batches_per_group: int = 64,
        by_length: bool = True,
    ) -> None:
        super().__init__(lengths, seed)
        longest = int(self.lengths.max())
        if longest > max_tokens:
            raise UserError(f"--max_tokens {max_tokens} is too small: the longest example has {longest} tokens")
        self.max_tokens = max_tokens
        self.groups = math.ceil(int(self.lengths.sum()) / (batches_per_group * max_tokens))
        self.by_length = by_length

    def _draw(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        order = self._by_length(rng, self.groups) if self.by_length else rng.permutation(len(self.lengths))
        places = _sums(self.lengths[order]).tolist()
        bounds = [0]
        while bounds[-1] < len(order):
            bounds.append(bisect.bisect_right(places, places[bounds[-1]] + self.max_tokens) - 1)
        return order, np.asarray(bounds)


def mean_predictions(order: BatchOrder, predictions: np.ndarray) -> float:
    """Mean number of labels in a batch of the first epoch.

    The sum of a batch's losses divided by this constant, in place of the batch's own number of labels, gives every
    label of the data the same weight in an epoch, whatever the order.

    Args:
        predictions: number of labels of every example.
    """
    return float(predictions.sum()) / order.batches_in(1)


def label_weights(batches: Iterable[Sequence[int]], predictions: np.ndarray) -> np.ndarray:
    """Weight that a label of each example has in the mean over batches of the mean loss of their labels.

    1 is the weight that every label has if all weigh the same.

    Args:
        batches: an epoch, or several.
        predictions: number of labels of every example.

    Returns:
        fp64 ``[examples]``, summed over the batches that an example is in and divided by the number of epochs that
        the batches make up.
    """
    weights = np.zeros(len(predictions))
    seen = count = 0
    for batch in batches:
        members: Any = np.asarray(batch)
        np.add.at(weights, members, 1.0 / predictions[members].sum())
        seen += len(members)
        count += 1
    epochs = seen / len(predictions)
    return weights * (predictions.sum() / (count / epochs)) / epochs

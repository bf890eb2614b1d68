"""Which examples make up which batch.

An order is asked for a batch by its number, so a run can go on anywhere, and it depends on nothing but its arguments,
so every rank has the same one. Numbers count the batches of all ranks (:func:`batch_numbers`): ranks get equally many,
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

    def mean_size(self) -> float:
        """Mean number of examples in a batch."""


def batch_numbers(step: int, per_step: int) -> range:
    """Numbers of the batches of a step.

    Args:
        per_step: processes times batches that each accumulates. Process ``r`` of ``n`` takes ``numbers[r::n]``, so one
            process that accumulates them all sees the same step.
    """
    return range(step * per_step, (step + 1) * per_step)


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

    def mean_size(self) -> float:
        """Every batch is full."""
        return float(self.batch_size)


def _random(seed: int, epoch: int) -> np.random.RandomState:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    # The one generator whose streams numpy keeps as they are from version to version.
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def _checked(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    if not len(lengths):
        raise ValueError("there are no examples to put in order")
    return np.asarray(lengths, dtype=np.int64)


class LengthGroupedBatches:
    """Full batches of about equal lengths.

    Each epoch shuffles the examples, sorts each stretch of ``batches_per_group`` batches by length, cuts it into
    batches and shuffles these. Every example comes once in every epoch. The batch in which an epoch ends is filled
    up from the next one; it holds random examples of both, unsorted. As all batches are full and chance alone decides
    who is where, no length is favoured.

    Args:
        lengths: tokens of every example.
        batch_size: examples in a batch.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, batches_per_group: int = 64
    ) -> None:
        self.lengths = _checked(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group = batch_size * batches_per_group
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def __getitem__(self, number: int) -> list[int]:
        examples, start, stop = len(self.lengths), number * self.batch_size, (number + 1) * self.batch_size
        found: list[int] = []
        while start < stop:
            epoch, place = divmod(start, examples)
            part = self._load(epoch)[place : place + stop - start]
            found += part.tolist()
            start += len(part)
        return found

    def batches_in(self, epochs: int) -> int:
        """Batches until every example was used ``epochs`` times."""
        return math.ceil(len(self.lengths) * epochs / self.batch_size)

    def mean_size(self) -> float:
        """Every batch is full."""
        return float(self.batch_size)

    def _load(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        return self._order

    def _draw(self, epoch: int) -> np.ndarray:
        """The examples of an epoch in order."""
        rng, examples, size = _random(self.seed, epoch), len(self.lengths), self.batch_size
        order = rng.permutation(examples)
        # Batches that are of this epoch alone begin and end here.
        first, last = -examples * epoch % size, examples - examples * (epoch + 1) % size
        if first < last:
            whole = order[first:last]
            for start in range(0, len(whole), self.group):
                stretch = whole[start : start + self.group]
                stretch[:] = stretch[np.argsort(self.lengths[stretch], kind="stable")]
            batches = whole.reshape(-1, size)
            batches[:] = batches[rng.permutation(len(batches))]
        return order


class TokenBudgetBatches:
    """Batches of as many examples as fit into a number of tokens.

    Each epoch shuffles the examples and sorts stretches of about ``batches_per_group`` batches by length, upwards and
    downwards in turn, so that neighbours have about equal lengths throughout. From a random place on, the round is cut
    into batches that are as full as they can be, and these are shuffled. Every example is in exactly one batch of an
    epoch. Only one batch of an epoch is smaller; how many there are varies a little.

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
        self.lengths = _checked(lengths)
        longest = int(self.lengths.max())
        if longest > max_tokens:
            raise UserError(f"--max_tokens {max_tokens} is too small: the longest example has {longest} tokens")
        self.max_tokens = max_tokens
        self.seed = seed
        self.groups = math.ceil(int(self.lengths.sum()) / (batches_per_group * max_tokens))
        self.by_length = by_length
        self._starts = [0]
        self._epoch = -1
        self._order = self._bounds = self._turns = np.zeros(0, dtype=np.int64)

    def __getitem__(self, number: int) -> list[int]:
        while self._starts[-1] <= number:
            self._append_epoch()
        epoch = bisect.bisect_right(self._starts, number) - 1
        self._load(epoch)
        batch = self._turns[number - self._starts[epoch]]
        return self._order[self._bounds[batch] : self._bounds[batch + 1]].tolist()

    def batches_in(self, epochs: int) -> int:
        """How many batches the first ``epochs`` epochs take; draws these epochs."""
        while len(self._starts) <= epochs:
            self._append_epoch()
        return self._starts[epochs]

    def mean_size(self) -> float:
        """Mean number of examples in a batch of the first epoch."""
        return len(self.lengths) / self.batches_in(1)

    def _append_epoch(self) -> None:
        self._load(len(self._starts) - 1)
        self._starts.append(self._starts[-1] + len(self._turns))

    def _load(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        rng = _random(self.seed, epoch)
        self._order = self._draw(rng)
        places = np.concatenate([[0], np.cumsum(self.lengths[self._order])]).tolist()
        bounds = [0]
        while bounds[-1] < len(self._order):
            bounds.append(bisect.bisect_right(places, places[bounds[-1]] + self.max_tokens) - 1)
        self._bounds, self._turns = np.asarray(bounds), rng.permutation(len(bounds) - 1)
        self._epoch = epoch

    def _draw(self, rng: np.random.RandomState) -> np.ndarray:
        order = rng.permutation(len(self.lengths))
        if not self.by_length:
            return order
        for i, stretch in enumerate(np.array_split(order, self.groups)):
            stretch[:] = stretch[np.argsort(self.lengths[stretch], kind="stable")][:: 1 - 2 * (i % 2)]
        # The batch that is left over at the end must not be the one of the longest examples every time.
        return np.roll(order, -rng.randint(len(order)))


def mean_predictions(order: BatchOrder, predictions: np.ndarray) -> float:
    """Mean number of labels in a batch.

    The sum of a batch's losses divided by this constant, in place of the batch's own number of labels, gives every
    label of the data the same weight, whatever the order.

    Args:
        predictions: number of labels of every example.
    """
    return float(predictions.mean()) * order.mean_size()


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

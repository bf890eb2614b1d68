"""Which examples make up which batch: once an epoch, the same everywhere, the same weight for all."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from minilm_fast.data.orders import (
    BatchOrder,
    LengthGroupedBatches,
    SequentialBatches,
    TokenBudgetBatches,
    batch_numbers,
    label_weights,
    mean_predictions,
    sequential_batch,
)
from minilm_fast.errors import UserError

_RNG = random.Random(3)
LENGTHS = np.array([_RNG.randint(10, 400) for _ in range(1003)])


def _orders(lengths: np.ndarray = LENGTHS, seed: int = 1) -> dict[str, BatchOrder]:
    return {
        "grouped": LengthGroupedBatches(lengths, 8, seed),
        "budget": TokenBudgetBatches(lengths, 2000, seed, batches_per_group=16),
        "budget-unsorted": TokenBudgetBatches(lengths, 2000, seed, by_length=False),
    }


NAMES = list(_orders())


def _epoch(order: BatchOrder, epoch: int) -> list[list[int]]:
    return [order[n] for n in range(order.batches_in(epoch), order.batches_in(epoch + 1))]


def _stream(order: BatchOrder, epochs: int) -> list[int]:
    return list(itertools.chain(*(order[n] for n in range(order.batches_in(epochs)))))


def test_sequential_batches_go_round() -> None:
    order = SequentialBatches(5, 3)
    expected = [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert [order[n] for n in range(3)] == [sequential_batch(n, 3, 5) for n in range(3)] == expected
    assert [order.batches_in(epochs) for epochs in range(4)] == [0, 2, 4, 5]


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_once_in_every_epoch(name: str) -> None:
    stream, size = _stream(_orders()[name], 5), len(LENGTHS)
    epochs = [stream[start : start + size] for start in range(0, 5 * size, size)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert epochs[0] != epochs[1]
    assert _stream(_orders(seed=2)[name], 1)[:size] != epochs[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_depends_on_seed_and_number_only(name: str) -> None:
    order = _orders()[name]
    first = [order[n] for n in range(400)]
    assert order.batches_in(1) < 200, "the numbers below reach into later epochs"
    for n in (399, 3, 250, 125, 0):
        assert order[n] == first[n]
        assert _orders()[name][n] == first[n]


def test_orders_do_not_change_from_version_to_version() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    grouped, budget = LengthGroupedBatches(lengths, 5, 5, 1), TokenBudgetBatches(lengths, 15, 5, 2)
    assert [grouped[n] for n in range(4)] == [[1, 8, 4, 11, 5], [3, 6, 0, 10, 7], [9, 2, 1, 10, 4], [6, 9, 0, 2, 5]]
    assert [budget[n] for n in range(4)] == [[2, 9, 1], [8, 7], [5], [11, 4]]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_the_batches_of_one_process(name: str) -> None:
    accumulation, world_size = 2, 3
    alone, ranks = _orders()[name], [_orders()[name] for _ in range(world_size)]
    together = []
    for step in range(80):
        numbers = batch_numbers(step, accumulation * world_size)
        for micro in range(accumulation):
            for rank, order in enumerate(ranks):
                together.append(order[numbers[rank::world_size][micro]])
    assert together == [alone[n] for n in range(80 * accumulation * world_size)]
    assert alone.batches_in(2) < len(together)


def test_grouped_batches_are_full_and_of_about_equal_lengths() -> None:
    order = LengthGroupedBatches(LENGTHS, 8, seed=1)
    assert [order.batches_in(epochs) for epochs in (1, 2, 8)] == [126, 251, 1003]
    batches = [order[n] for n in range(1003)]
    assert {len(batch) for batch in batches} == {8}
    spread = np.array([np.ptp(LENGTHS[batch]) for batch in batches])
    assert (spread > 40).sum() <= 20, "the batches between two epochs and the longest of a short stretch"
    assert np.median(spread) < 10
    first_lengths = [LENGTHS[batch[0]] for batch in batches[:125]]
    assert first_lengths != sorted(first_lengths)


@pytest.mark.parametrize("examples", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_grouped_batches_of_few_examples(examples: int) -> None:
    order = LengthGroupedBatches(LENGTHS[:examples], 8, seed=0)
    stream = list(itertools.chain(*(order[n] for n in range(order.batches_in(9)))))
    for start in range(0, 9 * examples, examples):
        assert sorted(stream[start : start + examples]) == list(range(examples))
    assert {len(order[n]) for n in range(9)} == {8}


@pytest.mark.parametrize("name", ["budget", "budget-unsorted"])
def test_budget_batches_are_full(name: str) -> None:
    batches = _epoch(_orders()[name], 0)
    tokens = np.array([LENGTHS[batch].sum() for batch in batches])
    assert tokens.max() <= 2000
    assert (tokens <= 2000 - 400).sum() <= 1, "all but one have no room for the longest example"
    spread = np.mean([np.ptp(LENGTHS[batch]) for batch in batches])
    assert spread < 40 if name == "budget" else spread > 200


def test_budget_batch_of_one_example() -> None:
    order = TokenBudgetBatches([7, 7, 7], 7, seed=0)
    assert sorted(order[n] for n in range(3)) == [[0], [1], [2]]
    with pytest.raises(UserError, match="--max_tokens 6 is too small: the longest example has 7 tokens"):
        TokenBudgetBatches([7, 1], 6, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_normaliser_gives_every_label_the_same_weight(name: str) -> None:
    predictions = LENGTHS // 13 + 1
    order = _orders()[name]
    constant = mean_predictions(order, predictions)
    weights = np.zeros(len(LENGTHS))
    # Eight epochs: those of the full batches end where an epoch ends.
    batches = [order[n] for n in range(order.batches_in(8))]
    for batch in batches:
        # What the mean over batches of sum(losses) / constant does to each label.
        np.add.at(weights, batch, 1 / constant / len(batches))
    np.testing.assert_allclose(weights, weights.mean(), rtol=1e-12)
    assert weights.mean() == pytest.approx(1 / predictions.sum(), rel=1e-12 if name == "grouped" else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_batches_and_the_weight_of_an_example(name: str) -> None:
    # Without regard to the labels: with one label an example, only the sizes of the batches can make a difference.
    order = _orders(LENGTHS[:99])[name]
    ones = np.ones(99)
    weights = label_weights((order[n] for n in range(order.batches_in(1600))), ones)
    assert weights.mean() == pytest.approx(1.0)
    if name == "grouped":
        assert weights == pytest.approx(ones, rel=1e-12)
        return
    # A budget of tokens takes more short examples into a batch than long ones, with and without sorting.
    by_length = np.argsort(LENGTHS[:99])
    assert weights[by_length[:20]].mean() < weights[by_length[-20:]].mean()


def test_label_weights_by_hand() -> None:
    weights = label_weights([[0, 1], [2]], np.array([1, 3, 4]))
    np.testing.assert_allclose(weights, [1.0, 1.0, 1.0])
    weights = label_weights([[0, 1], [2], [0], [1, 2]], np.array([1, 3, 4]))
    # Two epochs of two batches; eight labels, so a label's even share is 1/4 of its batch's mean.
    np.testing.assert_allclose(weights, [(4 / 4 + 4 / 1) / 2, (4 / 4 + 4 / 7) / 2, (4 / 4 + 4 / 7) / 2])

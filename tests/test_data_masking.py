"""Samples of the three ways against the original's, draw for draw."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from minilm_fast.data.masking import (
    MASK_WAYS,
    Feature,
    Masker,
    Masking,
    Sample,
    SpecialIds,
    make_masker,
)
from minilm_fast.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "train" / "dataset.json").read_text())
FEATURES = [Feature(**feature) for feature in GOLDEN["features"]]
SPECIAL = SpecialIds(cls=2, sep=3, mask=4, vocab_size=400)


def _golden_masker(case: dict) -> Masker:
    arguments = case["args"]
    special = SpecialIds(arguments["cls_id"], arguments["sep_id"], arguments["mask_id"], arguments["vocab_size"])
    masking = Masking(
        arguments["random_prob"],
        arguments["keep_prob"],
        arguments["source_mask_prob"],
        arguments["target_mask_prob"],
    )
    return make_masker(
        case["mask_way"],
        special,
        masking,
        arguments["max_source_len"],
        arguments["max_target_len"],
        random.Random(case["python_random_seed"]),
        arguments["num_max_mask_token"],
    )


def _padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


def _as_original(sample: Sample, case: dict) -> list:
    """The sample as the original's data set gives it: padded fields, then the two lengths."""
    target_length, most = case["args"]["max_target_len"], case["effective_num_max_mask_token"]
    lengths = [len(sample.source), len(sample.target)]
    source = _padded(sample.source, case["args"]["max_source_len"])
    target = _padded(sample.target, target_length)
    if case["mask_way"] == "v2":
        return [source, target, _padded(sample.labels, target_length), _padded(sample.pseudo, target_length), *lengths]
    weights = _padded([1] * len(sample.labels), most)
    return [source, target, _padded(sample.labels, most), _padded(sample.predicted, most), weights, *lengths]


@pytest.mark.parametrize("case", GOLDEN["datasets"], ids=lambda c: f"{c['mask_way']}-{c['python_random_seed']}")
def test_samples_follow_the_original_draw_for_draw(case: dict) -> None:
    masker = _golden_masker(case)
    assert len(case["items_in_order"]) >= 26
    for i, expected in enumerate(case["items_in_order"]):
        feature = FEATURES[(case["args"]["offset"] + i) % len(FEATURES)]
        sample = masker(feature)
        assert _as_original(sample, case) == expected
        source, target = len(feature.source_ids), len(feature.target_ids)
        counts = (len(sample.source), len(sample.target), len(sample.pseudo))
        assert masker.segments(source, target) == counts
        assert sample.length == sum(counts)
        assert masker.predictions(target) == len(sample.predicted) == len(sample.labels)


def test_goldens_hold_every_way() -> None:
    assert {case["mask_way"] for case in GOLDEN["datasets"]} == set(MASK_WAYS)


def test_shuffle_follows_the_original() -> None:
    for case in GOLDEN["shuffle"]:
        rng = random.Random(case["python_random_seed"])
        order = list(range(len(case["order_of_example_ids"])))
        rng.shuffle(order)
        assert order == case["order_of_example_ids"]
        assert rng.random() == pytest.approx(case["random_after"], abs=1e-12)


@pytest.mark.parametrize("mask_way", MASK_WAYS)
def test_lengths_of_many_samples_at_once(mask_way: str) -> None:
    masker = make_masker(mask_way, SPECIAL, Masking(target_mask_prob=0.3), 12, 7, random.Random(0), 2)
    source, target = np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32)[::-1]
    counts = np.stack(masker.segments(source, target))
    labels = masker.predictions(target)
    for i in range(20):
        assert tuple(counts[:, i]) == masker.segments(int(source[i]), int(target[i]))
        assert labels[i] == masker.predictions(int(target[i]))


@pytest.mark.parametrize("mask_way", MASK_WAYS)
def test_a_restored_state_gives_the_same_samples(mask_way: str) -> None:
    rng = random.Random(7)
    masker = make_masker(mask_way, SPECIAL, Masking(source_mask_prob=0.2), 24, 10, rng)
    state = rng.getstate()
    first = [masker(feature) for feature in FEATURES]
    assert [masker(feature) for feature in FEATURES] != first
    rng.setstate(state)
    assert [masker(feature) for feature in FEATURES] == first


def test_the_feature_is_left_as_it_was() -> None:
    feature = Feature([10, 11, 12], [20, 21, 22])
    for mask_way in MASK_WAYS:
        masker = make_masker(mask_way, SPECIAL, Masking(0.5, 0.0, 1.0, 1.0), 24, 10, random.Random(0))
        masker(feature)
    assert feature == Feature([10, 11, 12], [20, 21, 22])


def test_source_may_be_empty() -> None:
    for mask_way, source in (("v0", [2]), ("v1", [2, 3]), ("v2", [2, 3])):
        assert make_masker(mask_way, SPECIAL, Masking(), 24, 10, random.Random(0))(Feature([], [9])).source == source


def test_masked_target_without_a_limit_masks_the_whole_share() -> None:
    masker = make_masker("v1", SPECIAL, Masking(0.0, 0.0, -1.0, 0.5), 24, 48, random.Random(0), 0)
    sample = masker(Feature([9], list(range(100, 139))))
    assert len(sample.labels) == 20
    assert [i for i, token in enumerate(sample.target) if token == SPECIAL.mask] == sorted(sample.predicted)


@pytest.mark.parametrize(
    ("mask_way", "source", "target", "most", "message"),
    [
        ("v3", 24, 10, 0, "--mask_way must be one of v0, v1, v2, not 'v3'"),
        ("v2", 1, 10, 0, "--max_source_seq_length must be at least 2"),
        ("v0", 0, 10, 0, "--max_source_seq_length must be at least 1"),
        ("v1", 24, 0, 0, "--max_target_seq_length must be at least 1"),
        ("v1", 24, 10, -1, "--num_max_mask_token"),
    ],
)
def test_limits_that_leave_no_room(mask_way: str, source: int, target: int, most: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_masker(mask_way, SPECIAL, Masking(), source, target, random.Random(0), most)
    assert make_masker("v0", SPECIAL, Masking(), 1, 1, random.Random(0))(Feature([8], [9])).labels == [3]
    assert make_masker("v2", SPECIAL, Masking(), 2, 1, random.Random(0))(Feature([8], [9])).source == [2, 3]

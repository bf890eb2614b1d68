"""The C++ n-gram blocking and beam selection against their specifications."""

from __future__ import annotations

import json
from pathlib import Path

import kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_fast import ops
from minilm_fast.ops import reference

UNITS = json.loads((Path(__file__).parent / "goldens" / "decode" / "forbid_ngram_units.json").read_text())
NAN = float("nan")


def _int(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_ngram_units_of_the_original() -> None:
    cases = UNITS["dup_ngram_candidates"]
    assert cases
    for case in cases:
        tokens = _int([case["seq"]])
        banned = ops.ban_repeated_ngrams(tokens, _int([len(case["seq"])]), case["n"], _int(case["ignore_ids"] or []))
        assert sorted(i for i in banned[0].tolist() if i >= 0) == sorted(case["forbidden_next_ids"]), case


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=24), min_size=1, max_size=70),
    st.integers(1, 5),
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=100)
def test_banned_ngrams(sequences: list[list[int]], n: int, ignored: list[int], spare: int) -> None:
    """Few different tokens, so that n-grams do repeat; what follows a sequence in its row plays no part."""
    width = max(map(len, sequences)) + spare
    tokens = torch.randint(0, 5, (len(sequences), width), dtype=torch.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = _int(sequence)
    arguments = (tokens, _int([len(s) for s in sequences]), n, _int(ignored))
    with kernel_checks.threads(2):
        banned = ops.ban_repeated_ngrams(*arguments)
    assert torch.equal(banned, reference.ban_repeated_ngrams(*arguments))
    for row, sequence in enumerate(sequences):
        grams = {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
        tail = tuple(sequence[len(sequence) - n + 1 :]) if n > 1 else ()
        watched = sequence if n == 1 else tail
        expected = {
            token
            for token in range(5)
            if (*tail, token) in grams and token not in ignored and not set(watched) & set(ignored)
        }
        assert {i for i in banned[row].tolist() if i >= 0} == expected


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_beam_step_is_a_stable_topk(examples: int, beams: int, width: int, ties: bool, seed: int) -> None:
    """The scores are those of torch.topk; the order is that of a stable sort, so equal scores keep theirs."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(examples, beams, width, generator=generator)
    scores = torch.randn(examples, beams, generator=generator)
    if ties:
        candidates, scores = candidates.round(), scores.round()
    ids = torch.randint(0, 6, (examples, beams, width), generator=generator, dtype=torch.int32)
    last = torch.randint(0, 6, (examples, beams), generator=generator, dtype=torch.int32)
    with kernel_checks.threads(2):
        best, best_ids, parents = ops.beam_step(candidates, ids, scores, last, 3)
    totals = (candidates + ((last == 3).float() * -10000.0 + scores)[..., None]).flatten(1)
    order = totals.argsort(dim=1, descending=True, stable=True)[:, :width]
    assert torch.equal(best, totals.topk(width, dim=1).values)
    assert torch.equal(best, totals.gather(1, order))
    assert torch.equal(best_ids, ids.flatten(1).gather(1, order))
    assert torch.equal(parents, (order // width).int())


def test_beam_step_with_nan_and_infinity() -> None:
    candidates = torch.tensor([[[0.0, NAN, -float("inf")], [float("inf"), NAN, 2.0]]])
    ids = torch.arange(6, dtype=torch.int32).view(1, 2, 3)
    best, best_ids, parents = ops.beam_step(candidates, ids, torch.zeros(1, 2), _int([[9, 9]]), 3)
    assert best_ids.tolist() == [[1, 4, 3]]
    assert parents.tolist() == [[0, 1, 1]]
    assert best[0, :2].isnan().all() and best[0, 2] == float("inf")


def _beam_arguments() -> dict[str, object]:
    return {
        "candidate_scores": torch.randn(2, 3, 4),
        "candidate_ids": torch.randint(0, 9, (2, 3, 4), dtype=torch.int32),
        "scores": torch.randn(2, 3),
        "last_ids": torch.randint(0, 9, (2, 3), dtype=torch.int32),
        "eos": 3,
    }


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.minilm_fast.beam_step.default, tuple(_beam_arguments().values()))
    torch.library.opcheck(
        torch.ops.minilm_fast.ban_repeated_ngrams.default,
        (torch.randint(0, 3, (4, 9), dtype=torch.int32), _int([9, 0, 4, 8]), 2, _int([1])),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate_scores": torch.zeros(2, 12)}, "candidate_scores must have the shape"),
        ({"candidate_scores": torch.zeros(2, 3, 4).double()}, "candidate_scores must be"),
        ({"candidate_scores": torch.zeros(2, 0, 4), "candidate_ids": torch.zeros(2, 0, 4).int()}, "one beam"),
        ({"candidate_ids": torch.zeros(2, 3, 5).int()}, "candidate_ids must have the shape"),
        ({"candidate_ids": torch.zeros(2, 3, 4).long()}, "candidate_ids must be"),
        ({"scores": torch.zeros(3, 2).t()}, "scores must be contiguous"),
        ({"last_ids": torch.zeros(2, 2).int()}, "last_ids must have the shape"),
    ],
)
def test_bad_beams(changes: dict[str, object], message: str) -> None:
    arguments = _beam_arguments() | changes
    if arguments["candidate_scores"].shape[1] == 0:
        arguments |= {"scores": torch.zeros(2, 0), "last_ids": torch.zeros(2, 0).int()}
    with pytest.raises(RuntimeError, match=f"beam_step: .*{message}"):
        torch.ops.minilm_fast.beam_step(*arguments.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5).long(), _int([1, 2]), 2, _int([])), "tokens must be"),
        ((torch.zeros(2, 5).int(), _int([1]), 2, _int([])), "lengths must have the shape"),
        ((torch.zeros(2, 5).int(), _int([1, 6]), 2, _int([])), r"lengths\[1\] is 6"),
        ((torch.zeros(2, 5).int(), _int([-1, 5]), 2, _int([])), r"lengths\[0\] is -1"),
        ((torch.zeros(2, 5).int(), _int([1, 2]), 0, _int([])), "n must be at least 1, got 0"),
        ((torch.zeros(2, 5).int(), _int([1, 2]), 2, torch.zeros(0)), "ignored must be"),
    ],
)
def test_bad_ngrams(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"ban_repeated_ngrams: .*{message}"):
        torch.ops.minilm_fast.ban_repeated_ngrams(*arguments)

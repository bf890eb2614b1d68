"""The C++ n-gram blocking and the step of the search against their specifications."""

from __future__ import annotations

import json
from pathlib import Path

import kernel_checks
import pytest
import torch
from beam_cases import CASES, BeamCase, bad_arguments, check
from beam_cases import arguments as beam_arguments
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_is_that_of_the_specification(case: BeamCase) -> None:
    with kernel_checks.threads(2):
        check(case, torch.ops.minilm_fast.advance_beams)


@given(st.integers(1, 20), st.integers(2, 9), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_the_choice_is_a_stable_topk(examples: int, beams: int, ties: bool, seed: int) -> None:
    """The scores are those of torch.topk; the order is that of a stable sort, so equal scores keep theirs."""
    arguments = beam_arguments(BeamCase(rows=examples, beams=beams, traced=True, ties=ties, seed=seed))
    arguments["running"][:] = True
    arguments["frame"][:] = 1
    candidates, ids = arguments["candidate_scores"], arguments["candidate_ids"]
    before = (arguments["last_ids"] == 3).float() * -10000.0 + arguments["scores"]
    totals = (candidates + before[..., None]).flatten(1)
    order = totals.argsort(dim=1, descending=True, stable=True)[:, :beams]
    torch.ops.minilm_fast.advance_beams(*arguments.values())
    assert torch.equal(arguments["scores"], totals.topk(beams, dim=1).values)
    assert torch.equal(arguments["scores"], totals.gather(1, order))
    assert torch.equal(arguments["last_ids"], ids.flatten(1).gather(1, order))
    assert torch.equal(arguments["trace_parents"][:, 1], (order // beams).int())


def test_the_choice_with_nan_and_infinity() -> None:
    arguments = beam_arguments(BeamCase(rows=1, beams=2, traced=True))
    arguments["running"][:], arguments["frame"][:] = True, 1
    arguments["scores"].zero_()
    arguments["last_ids"][:] = 9
    arguments["candidate_scores"] = torch.tensor([[[0.0, NAN], [float("inf"), NAN]]])
    arguments["candidate_ids"] = torch.arange(4, dtype=torch.int32).view(1, 2, 2)
    torch.ops.minilm_fast.advance_beams(*arguments.values())
    assert arguments["last_ids"].tolist() == [[1, 3]]
    assert arguments["trace_parents"][0, 1].tolist() == [0, 1]
    assert arguments["scores"].isnan().all()


def test_opcheck() -> None:
    arguments = tuple(beam_arguments(BeamCase(rows=3, traced=True)).values())
    torch.library.opcheck(torch.ops.minilm_fast.advance_beams.default, arguments)
    torch.library.opcheck(
        torch.ops.minilm_fast.ban_repeated_ngrams.default,
        (torch.randint(0, 3, (4, 9), dtype=torch.int32), _int([9, 0, 4, 8]), 2, _int([1])),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *bad_arguments(),
        ({"rows": _int([0, 7, 1])}, r"rows\[1\] is 7, there are 7 rows"),
        ({"frame": torch.full((7,), 9).int(), "running": torch.ones(7).bool()}, r"frame\[5\] is 9, tokens holds 9"),
        ({"steps": torch.full((7,), -1).int(), "running": torch.ones(7).bool()}, r"steps\[5\] is -1"),
    ],
)
def test_bad_steps(changes: dict[str, object], message: str) -> None:
    arguments = beam_arguments(CASES["some rows"]) | changes
    with pytest.raises(RuntimeError, match=f"advance_beams: .*{message}"):
        torch.ops.minilm_fast.advance_beams(*arguments.values())


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

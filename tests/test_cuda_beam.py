"""The CUDA n-gram blocking and step of the search, emulated on a CPU, against their specifications."""

from __future__ import annotations

import pytest
import torch
from beam_cases import CASES, BeamCase, bad_arguments, check
from beam_cases import arguments as beam_arguments
from emulated_cuda import operators, poisoned_results, running_backwards

from minilm_fast.ops import reference


def _int(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _ban(*arguments: object) -> torch.Tensor:
    with poisoned_results():
        return operators().ban_repeated_ngrams(*arguments)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 60])
@pytest.mark.parametrize("ignored", [[], [2], [1, 3, 99]])
def test_banned_ngrams(n: int, ignored: list[int]) -> None:
    """Few different tokens, so that n-grams do repeat; what follows a sequence in its row plays no part."""
    torch.manual_seed(n)
    lengths = _int([0, 1, 2, 33, 64, 65, 96, *torch.randint(0, 97, (20,)).tolist()])
    tokens = torch.randint(0, 5, (len(lengths), 96), dtype=torch.int32)
    tokens[4] = 0
    arguments = (tokens, lengths, n, _int(ignored))
    banned = _ban(*arguments)
    assert torch.equal(banned, reference.ban_repeated_ngrams(*arguments))
    with running_backwards():
        assert torch.equal(banned, _ban(*arguments))


def test_no_tokens() -> None:
    assert _ban(torch.zeros(0, 4).int(), _int([]), 2, _int([])).shape == (0, 4)
    assert _ban(torch.zeros(3, 0).int(), _int([0, 0, 0]), 2, _int([])).shape == (3, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_is_that_of_the_specification(case: BeamCase) -> None:
    check(case, operators().advance_beams)
    with running_backwards():
        check(case, operators().advance_beams)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5).long(), _int([1, 2]), 2, _int([])), "tokens must be"),
        ((torch.zeros(2, 5).int(), _int([1]), 2, _int([])), "lengths must have the shape"),
        ((torch.zeros(2, 5).int(), _int([1, 2]), 0, _int([])), "n must be at least 1, got 0"),
        ((torch.zeros(2, 5).int(), _int([1, 2]), 2, torch.zeros(0)), "ignored must be"),
    ],
)
def test_bad_ngrams(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"ban_repeated_ngrams: .*{message}"):
        _ban(*arguments)


@pytest.mark.parametrize(("changes", "message"), bad_arguments())
def test_bad_steps(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"advance_beams: .*{message}"):
        operators().advance_beams(*(beam_arguments(CASES["some rows"]) | changes).values())


def test_too_many_beams() -> None:
    with pytest.raises(RuntimeError, match="advance_beams: tokens must have at most 64 beams on CUDA, got 65"):
        operators().advance_beams(*beam_arguments(BeamCase(rows=1, beams=65)).values())

"""The CUDA n-gram blocking and beam selection, emulated on a CPU, against their specifications."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import operators, poisoned_results, running_backwards

from minilm_fast.ops import reference

NAN = float("nan")


def _int(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _ban(*arguments: object) -> torch.Tensor:
    with poisoned_results():
        return operators().ban_repeated_ngrams(*arguments)


def _step(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with poisoned_results():
        return operators().beam_step(*arguments)


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


@pytest.mark.parametrize(("examples", "beams", "width"), [(3, 1, 1), (4, 5, 5), (2, 9, 3), (1, 20, 20), (0, 4, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_beam_step_is_a_stable_topk(examples: int, beams: int, width: int, ties: bool) -> None:
    torch.manual_seed(beams)
    candidates, scores = torch.randn(examples, beams, width), torch.randn(examples, beams)
    if ties:
        candidates, scores = candidates.round(), scores.round()
    ids = torch.randint(0, 6, (examples, beams, width), dtype=torch.int32)
    last = torch.randint(0, 6, (examples, beams), dtype=torch.int32)
    best, best_ids, parents = _step(candidates, ids, scores, last, 3)
    totals = (candidates + ((last == 3).float() * -10000.0 + scores)[..., None]).flatten(1)
    order = totals.argsort(dim=1, descending=True, stable=True)[:, :width]
    assert torch.equal(best, totals.gather(1, order))
    assert torch.equal(best_ids, ids.flatten(1).gather(1, order))
    assert torch.equal(parents, (order // width).int())


def test_beam_step_with_nan_and_infinity() -> None:
    candidates = torch.tensor([[[0.0, NAN, -float("inf")], [float("inf"), NAN, 2.0]]])
    ids = torch.arange(6, dtype=torch.int32).view(1, 2, 3)
    best, best_ids, parents = _step(candidates, ids, torch.zeros(1, 2), _int([9, 9]).view(1, 2), 3)
    assert best_ids.tolist() == [[1, 4, 3]]
    assert parents.tolist() == [[0, 1, 1]]
    assert best[0, :2].isnan().all() and best[0, 2] == float("inf")


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(2, 12)}, "candidate_scores must have the shape"),
        ({0: torch.zeros(2, 3, 4).double()}, "candidate_scores must be"),
        ({1: torch.zeros(2, 3, 5).int()}, "candidate_ids must have the shape"),
        ({2: torch.zeros(3, 2).t()}, "scores must be contiguous"),
        ({3: torch.zeros(2, 3).long()}, "last_ids must be"),
        (
            {
                0: torch.zeros(1, 91, 91),
                1: torch.zeros(1, 91, 91).int(),
                2: torch.zeros(1, 91),
                3: torch.zeros(1, 91).int(),
            },
            "8192 candidates",
        ),
    ],
)
def test_bad_beams(changes: dict[int, torch.Tensor], message: str) -> None:
    arguments: list[object] = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).int(), torch.zeros(2, 3)]
    arguments += [torch.zeros(2, 3).int(), 3]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=f"beam_step: .*{message}"):
        _step(*arguments)

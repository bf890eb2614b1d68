"""The CUDA lm_head_topk, emulated on a CPU, against its specification."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import operators, poisoned_results, running_backwards

from minilm_fast.ops import reference

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}
DTYPES = tuple(FORMATS)
Optional = torch.Tensor | None


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    banned: Optional = None,
    suppress_id: int = -1,
    suppress: Optional = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_results():
        return operators().lm_head_topk(
            x, weight, bias, weight.shape[0], FORMATS[weight.dtype], k, banned, suppress_id, suppress
        )


def _scores(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, banned: Optional, suppress_id: int, suppress: Optional
) -> torch.Tensor:
    """Every word's score in fp64, from operands rounded as the kernel rounds them."""
    everything = weight.shape[0]
    values, ids = reference.lm_head_topk(
        *(x.to(weight.dtype).double(), weight.double(), bias.double(), "fp32", everything),
        *(banned, suppress_id, suppress),
    )
    return torch.empty_like(values).scatter_(1, ids.long(), values)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    banned: Optional = None,
    suppress_id: int = -1,
    suppress: Optional = None,
    tolerance: float = 1e-5,
) -> None:
    """Each place holds a word whose score is its own and, but for rounding, that of the place."""
    values, ids = _run(x, weight, bias, k, banned, suppress_id, suppress)
    assert values.dtype == torch.float32 and ids.dtype == torch.int32
    scores = _scores(x, weight, bias, banned, suppress_id, suppress)
    expected = scores.topk(k, dim=1).values
    torch.testing.assert_close(values.double(), scores.gather(1, ids.long()), rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=tolerance)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (values[:, 1:] <= values[:, :-1]).all()
    with running_backwards():
        again = _run(x, weight, bias, k, banned, suppress_id, suppress)
    assert torch.equal(values, again[0]) and torch.equal(ids, again[1])


def _operands(
    rows: int, features: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (
        torch.randn(rows, features),
        (torch.randn(vocabulary, features) * 2 * features**-0.5).to(dtype),
        torch.randn(vocabulary),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "features", "vocabulary", "k"),
    [(1, 8, 1, 1), (5, 40, 127, 5), (70, 72, 300, 8), (3, 384, 129, 9), (2, 16, 520, 16)],
)
def test_shapes(dtype: torch.dtype, rows: int, features: int, vocabulary: int, k: int) -> None:
    _check(*_operands(rows, features, vocabulary, dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_and_suppressed(dtype: torch.dtype) -> None:
    rows, vocabulary = 67, 260
    x, weight, bias = _operands(rows, 32, vocabulary, dtype, seed=3)
    best = _scores(x, weight, bias, None, -1, None).topk(8, dim=1).indices.int()
    banned = torch.full((rows, 12), -1, dtype=torch.int32)
    banned[:, 3:11] = best
    banned[::2, 4] = banned[::2, 3]
    banned[1, 11] = 7
    suppress = torch.arange(rows) % 3 == 0
    # Also a word that is banned and suppressed at once.
    for suppressed in (7, int(best[0, 0])):
        _check(x, weight, bias, 5, banned, suppressed, suppress)
    _check(x, weight, bias, 5, None, 7, suppress)
    _check(x, weight, bias, 5, banned)
    _check(x, weight, bias, 5, banned[:, :0])


def test_everything_is_banned() -> None:
    """The banned are candidates still, 10000 below; the suppressed one is at -10000 whatever it was."""
    x, weight, bias = _operands(3, 8, 6, torch.float32)
    banned = torch.arange(6, dtype=torch.int32).expand(3, 6).contiguous()
    _check(x, weight, bias, 6, banned, 2, torch.tensor([True, False, True]), tolerance=2e-3)


def test_ids_beyond_the_vocabulary_ban_nothing() -> None:
    x, weight, bias = _operands(2, 8, 5, torch.float32)
    banned = torch.tensor([[5, 900], [-7, -1]], dtype=torch.int32)
    ours, plain = _run(x, weight, bias, 3, banned), _run(x, weight, bias, 3)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_large_logits_and_equal_ones() -> None:
    x, weight, bias = torch.ones(2, 8), torch.zeros(300, 8), torch.zeros(300)
    bias[[3, 200, 131]] = 3e4
    values, ids = _run(x, weight, bias, 5)
    assert ids.tolist() == [[3, 131, 200, 0, 1]] * 2
    torch.testing.assert_close(values[0, :3], torch.full((3,), -(torch.tensor(3.0).log().item())))
    assert values[0, 3] == -3e4 - torch.tensor(3.0).log()


def test_words_of_probability_zero() -> None:
    x, weight, bias = torch.zeros(1, 8), torch.zeros(9, 8), torch.full((9,), -float("inf"))
    bias[4] = 0.0
    values, ids = _run(x, weight, bias, 3)
    assert ids.tolist() == [[4, 0, 1]] and values.tolist() == [[0.0, -float("inf"), -float("inf")]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite(poison: float) -> None:
    x, weight, bias = _operands(3, 8, 200, torch.float32)
    x[1, 2] = poison
    values, ids = _run(x, weight, bias, 4)
    assert values[1].isnan().all() and ids[1].tolist() == [0, 1, 2, 3]
    plain = _run(x[[0, 2]].contiguous(), weight, bias, 4)
    assert torch.equal(values[[0, 2]], plain[0]) and torch.equal(ids[[0, 2]], plain[1])


def test_results_do_not_depend_on_the_other_rows() -> None:
    x, weight, bias = _operands(130, 24, 300, torch.bfloat16)
    together = _run(x, weight, bias, 4)
    for rows in ([0], [64, 3], [129, 1, 77]):
        part = _run(x[rows].contiguous(), weight, bias, 4)
        assert torch.equal(part[0], together[0][rows]) and torch.equal(part[1], together[1][rows])


def test_no_rows() -> None:
    values, ids = _run(*_operands(0, 8, 20, torch.float16), 3)
    assert values.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x must be"),
        ({"x": torch.zeros(2, 16)}, "weight must have the shape"),
        ({"weight": torch.zeros(8, 20).t()}, "weight must be contiguous"),
        ({"format": 1}, "weight must be fp32, bf16 or fp16 as its format says"),
        ({"weight": torch.zeros(20, 6), "x": torch.zeros(2, 6)}, "rows of weight must be multiples of 16 bytes"),
        ({"bias": torch.zeros(19)}, "bias must have the shape"),
        ({"k": 17}, "k must be from 1"),
        ({"k": 0}, "k must be from 1"),
        ({"banned": torch.zeros(2, 3)}, "banned must be"),
        ({"banned": torch.zeros(3, 3, dtype=torch.int32)}, "banned must have the shape"),
        ({"suppress": torch.zeros(2, dtype=torch.int32)}, "suppress must be"),
        ({"suppress": torch.zeros(2, dtype=torch.bool), "suppress_id": 20}, "suppress_id must be from 0 to 19"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(20, 8),
        "bias": torch.zeros(20),
        "vocab_size": 20,
        "format": 0,
        "k": 2,
        "banned": None,
        "suppress_id": -1,
        "suppress": None,
    }
    with pytest.raises(RuntimeError, match=f"lm_head_topk: .*{message}"):
        operators().lm_head_topk(*(arguments | changes).values())

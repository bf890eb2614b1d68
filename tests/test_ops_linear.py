"""The C++ packed-weight products and the vocabulary projection against their specifications."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BEST_ISA, DTYPES, EPSILON, ISAS, assert_accurate, instruction_set, threads, wide

from minilm_fast import ops
from minilm_fast.ops import reference

FORMATS = ("fp32", "bf16", "int8")
SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (1, 1152, 384),
    (2, 3, 5),
    (2, 17, 33),
    (7, 47, 64),
    (7, 100, 1),
    (17, 64, 100),
    (33, 1001, 384),
    (33, 384, 1536),
    (64, 33, 63),
    (320, 96, 31),
    (320, 1152, 97),
]
VOCABULARY = 1001


def problem(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ``x [m, k]``, ``weight [n, k]`` and ``bias [n]`` whose results are of the size of 1."""
    torch.manual_seed(m * 7 + n * 3 + k)
    return torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)


def run(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, format: str, activation: str = "none"
) -> torch.Tensor:
    return ops.linear(x, ops.pack_weight(weight, format), bias, activation)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_linear(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, format: str, activation: str) -> None:
    x, weight, bias = problem(*shape)
    x = x.to(dtype)
    with instruction_set(isa):
        out = run(x, weight, bias, format, activation)
    eager = reference.linear(x, weight, bias, format, activation)
    exact = reference.linear(*wide(x, weight, bias), format, activation)
    if activation == "none" or dtype == torch.bfloat16:
        assert_accurate(out, eager, exact)
    elif exact.numel():
        # The erf-GELU has an absolute error of its own.
        assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max() + 5e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_exact(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The integers and their sum are exact and the scales are applied as specified: every bit is the same."""
    x, weight, bias = problem(*shape)
    x = x.to(dtype)
    with instruction_set(isa):
        out = run(x, weight, bias, "int8")
        without_bias = run(x, weight, None, "int8")
        activated = run(x, weight, bias, "int8", "gelu")
    assert torch.equal(out, reference.linear(x, weight, bias, "int8", "none"))
    assert torch.equal(without_bias, reference.linear(x, weight, None, "int8", "none"))
    eager = reference.linear(x, weight, bias, "int8", "gelu")
    # In bf16 the GELU itself is exact to 2e-4 only.
    relative, absolute = (1e-6, 1e-6) if dtype == torch.float32 else (2.0**-7, 3e-4)
    torch.testing.assert_close(activated, eager, rtol=relative, atol=absolute)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_rounds_half_to_even(isa: str) -> None:
    """Quotients on and beside the halves, at scales from the smallest to the largest numbers."""
    halves = torch.arange(-127, 127).float() + 0.5
    x = torch.stack([torch.nextafter(halves, -halves.abs() * 9), halves, torch.nextafter(halves, halves.abs() * 9)])
    x = torch.cat([x.reshape(1, -1), torch.full((1, 1), 127.0)], dim=1)
    powers = torch.tensor([2.0**p for p in (-140, -130, -120, -70, -20, 0, 20, 100, 120)])[:, None]
    x = torch.cat([x * powers, x * powers * 1.7, torch.randn(40, x.shape[1])])
    weight = torch.eye(x.shape[1])
    with instruction_set(isa):
        out = run(x, weight, None, "int8")
    assert torch.equal(out, reference.linear(x, weight, None, "int8", "none"))


@pytest.mark.parametrize("isa", ISAS)
def test_int8_at_its_limits(isa: str) -> None:
    """All products of one sign and of the largest magnitude."""
    x = torch.ones(5, 4096) * torch.tensor([1.0, -1.0, 3.0, -1e-3, 1e3])[:, None]
    weight = torch.cat([torch.ones(20, 4096), -torch.ones(20, 4096)])
    with instruction_set(isa):
        out = run(x, weight, None, "int8")
    assert torch.equal(out, reference.linear(x, weight, None, "int8", "none"))


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weight_serves_every_instruction_set(format: str) -> None:
    _, weight, _ = problem(1, 100, 70)
    blobs = []
    for isa in ISAS:
        with instruction_set(isa):
            blobs.append(ops.pack_weight(weight, format).data)
    assert all(torch.equal(blobs[0], blob) for blob in blobs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(isa: str, format: str, dtype: torch.dtype) -> None:
    x, weight, bias = problem(330, 100, 384)
    x = x.to(dtype)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, format)
        whole = ops.linear(x, packed, bias, "gelu")
        for begin, end in ((0, 1), (5, 7), (3, 20), (100, 133), (17, 330)):
            assert torch.equal(ops.linear(x[begin:end], packed, bias, "gelu"), whole[begin:end])
        x[1::2] = float("nan")
        assert torch.equal(ops.linear(x, packed, bias, "gelu")[::2], whole[::2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 100, 2500])
def test_linear_does_not_depend_on_threads(format: str, dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = problem(rows, 500, 391)
    x = x.to(dtype)
    packed = ops.pack_weight(weight, format)
    outs = []
    for count in (1, 2, 3):
        with threads(count):
            outs.append(ops.linear(x, packed, bias, "gelu"))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(isa: str, format: str, dtype: torch.dtype) -> None:
    _, weight, bias = problem(9, 40, 96)
    base = torch.randn(30, 300).to(dtype)
    views = [base[:, 100:196], base[::3, :96], base[5:6, 7:103].expand(4, 96), base.t()[:20, :30].repeat(1, 4)[:, :96]]
    with instruction_set(isa):
        packed = ops.pack_weight(weight, format)
        for view in [*views, base[:, : 2 * 96 : 2]]:
            assert torch.equal(ops.linear(view, packed, bias), ops.linear(view.contiguous(), packed, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite(isa: str, format: str) -> None:
    """A row with a NaN or an infinity gives no finite result in int8; no other row is touched in any format."""
    x, weight, bias = problem(40, 50, 65)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, format)
        clean = ops.linear(x, packed, bias)
        x[3, 64], x[20, 0] = float("nan"), float("inf")
        out = ops.linear(x, packed, bias)
    assert out[3].isnan().all() and not out[20].isfinite().any()
    x[3], x[20] = 0, 0
    rest = [i for i in range(40) if i not in (3, 20)]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_weights_of_zeros(isa: str, format: str) -> None:
    x, weight, bias = problem(20, 50, 40)
    x[::2], weight[::3] = 0, 0
    with instruction_set(isa):
        out = run(x, weight, bias, format)
    assert torch.equal(out[::2], bias.expand(10, 50))
    assert torch.equal(out[:, ::3], bias[::3].expand(20, 17))


@pytest.mark.parametrize("format", FORMATS)
def test_weight_in_bf16(format: str) -> None:
    x, weight, bias = problem(4, 50, 40)
    assert torch.equal(run(x, weight.bfloat16(), bias, format), run(x, weight.bfloat16().float(), bias, format))


def head_problem(m: int, k: int, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`problem`, with logits spread as those of a language model are."""
    x, weight, bias = problem(m, vocabulary, k)
    return x * 3, weight, bias


def assert_topk(out: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, k: int, tolerance: float = 1e-5) -> None:
    """``out`` holds the ``k`` best of ``scores`` (fp64), but that scores closer than the tolerance may swap."""
    values, ids = out
    assert values.dtype == torch.float32 and ids.dtype == torch.int32
    assert values.shape == ids.shape == (scores.shape[0], k)
    best = scores.topk(k, dim=-1).values
    # Near -10000 the spacing of fp32 is 1e-3.
    limit = tolerance + 2 * EPSILON * best.abs()
    assert ((values - best).abs() <= limit).all()
    assert ((scores.gather(1, ids.long()) - values).abs() <= limit).all()
    assert (values.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in ids.tolist())


def head_scores(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    format: str,
    banned: torch.Tensor | None = None,
    suppress_id: int = -1,
    suppress: torch.Tensor | None = None,
) -> torch.Tensor:
    """All scores in fp64, by the specification; for int8 from the integers of fp32."""
    vocabulary = weight.shape[0]
    inputs = (x.float(), weight, bias) if format == "int8" else wide(x, weight, bias)
    values, ids = reference.lm_head_topk(*inputs, format, vocabulary, banned, suppress_id, suppress)
    return torch.empty_like(values, dtype=torch.float64).scatter_(1, ids.long(), values.double())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [0, 1, 7, 33, 170])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_lm_head_topk(isa: str, format: str, m: int, k: int) -> None:
    x, weight, bias = head_problem(m, 96)
    with instruction_set(isa):
        out = ops.lm_head_topk(x, ops.pack_weight(weight, format), bias, k)
    if m == 0:
        assert out[0].shape == out[1].shape == (0, k)
        return
    assert_topk(out, head_scores(x, weight, bias, format), k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocabulary", [1, 3, 16, 17, 100, 511, 512, 513, 5000])
def test_vocabularies(isa: str, vocabulary: int) -> None:
    x, weight, bias = head_problem(5, 40, vocabulary)
    scores = head_scores(x, weight, bias, "fp32")
    with instruction_set(isa):
        packed = ops.pack_weight(weight, "fp32")
        for k in {1, min(4, vocabulary), vocabulary}:
            assert_topk(ops.lm_head_topk(x, packed, bias, k), scores, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_and_suppressed(isa: str, format: str, dtype: torch.dtype) -> None:
    """Banned are the very ids that would win, some of them twice, and now and then the suppressed id as well."""
    x, weight, bias = head_problem(24, 96)
    x = x.to(dtype)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, format)
        _, best = ops.lm_head_topk(x, packed, bias, 12)
        banned = torch.cat([best[:, ::2], best[:, :3], torch.full_like(best[:, :4], -1)], dim=1)
        banned = banned.gather(1, torch.rand(banned.shape).argsort(1))
        suppress = torch.rand(24) < 0.6
        for suppress_id in (int(best[0, 0]), int(best[1, 1]), VOCABULARY - 1):
            out = ops.lm_head_topk(x, packed, bias, 10, banned=banned, suppress_id=suppress_id, suppress=suppress)
            assert_topk(out, head_scores(x, weight, bias, format, banned, suppress_id, suppress), 10)


@pytest.mark.parametrize("isa", ISAS)
def test_more_wanted_than_allowed(isa: str) -> None:
    """Where nothing else is left, the forbidden ids come, by their scores."""
    x, weight, bias = head_problem(6, 40, 20)
    banned = torch.arange(17, dtype=torch.int32).expand(6, 17).clone()
    banned[0] = -1
    suppress = torch.tensor([True, False] * 3)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, "fp32")
        out = ops.lm_head_topk(x, packed, bias, 20, banned=banned, suppress_id=18, suppress=suppress)
    scores = head_scores(x, weight, bias, "fp32", banned, 18, suppress)
    assert_topk(out, scores, 20)
    row = out[1][2].tolist()
    assert set(row[:2]) == {17, 19} and out[0][2, row.index(18)] == -10000.0


def test_rows_of_strided_bans() -> None:
    x, weight, bias = head_problem(6, 40, 50)
    packed = ops.pack_weight(weight, "fp32")
    banned = torch.randint(-1, 50, (9, 6), dtype=torch.int32).t()
    out = ops.lm_head_topk(x, packed, bias, 5, banned=banned)
    same = ops.lm_head_topk(x, packed, bias, 5, banned=banned.contiguous())
    assert torch.equal(out[0], same[0]) and torch.equal(out[1], same[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_head_rows_do_not_depend_on_each_other(isa: str, format: str) -> None:
    x, weight, bias = head_problem(170, 96)
    banned = torch.randint(-1, VOCABULARY, (170, 9), dtype=torch.int32)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, format)
        values, ids = ops.lm_head_topk(x, packed, bias, 5, banned=banned)
        for begin, end in ((0, 1), (5, 7), (3, 20), (150, 170)):
            part = ops.lm_head_topk(x[begin:end], packed, bias, 5, banned=banned[begin:end])
            assert torch.equal(part[0], values[begin:end]) and torch.equal(part[1], ids[begin:end])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "vocabulary"), [(50, 600), (350, 600), (50, 5000)])
def test_head_does_not_depend_on_threads(format: str, m: int, vocabulary: int) -> None:
    """Every score is there twice, so that the order of what is equal counts as well."""
    x, weight, bias = head_problem(m, 64, vocabulary)
    weight[1::2] = weight[::2]
    bias[1::2] = bias[::2]
    banned = torch.randint(-1, vocabulary, (m, 9), dtype=torch.int32)
    packed = ops.pack_weight(weight, format)
    outs = []
    for count in (1, 2, 3):
        with threads(count):
            outs.append(ops.lm_head_topk(x, packed, bias, 7, banned=banned))
    assert all(torch.equal(a, b) for out in outs[1:] for a, b in zip(out, outs[0], strict=True))
    values, ids = outs[0]
    first, second = ids[:, 0].tolist(), ids[:, 1].tolist()
    assert any(values[i, 0] == values[i, 1] for i in range(m))
    assert all(first[i] < second[i] for i in range(m) if values[i, 0] == values[i, 1]), "the lower id comes first"


@pytest.mark.parametrize("isa", ISAS)
def test_head_of_what_is_not_finite(isa: str) -> None:
    x, weight, bias = head_problem(5, 40)
    with instruction_set(isa):
        packed = ops.pack_weight(weight, "fp32")
        clean = ops.lm_head_topk(x, packed, bias, 4)
        x[1, 7], x[3, 0] = float("nan"), float("inf")
        values, ids = ops.lm_head_topk(x, packed, bias, 4)
        masked = bias.clone()
        masked[::2] = -float("inf")
        few, odd = ops.lm_head_topk(x[:1], packed, masked, 500)
    assert values[[1, 3]].isnan().all() and ((ids >= 0) & (ids < VOCABULARY)).all()
    assert torch.equal(values[[0, 2, 4]], clean[0][[0, 2, 4]]) and torch.equal(ids[[0, 2, 4]], clean[1][[0, 2, 4]])
    assert few.isfinite().all() and (odd % 2 == 1).all()


def linear_op(x: torch.Tensor, bias: torch.Tensor | None = None, **changes: object) -> torch.Tensor:
    """The operator itself, below the checks of its Python wrapper."""
    arguments = {"weight": ops.pack_weight(torch.randn(6, 8)).data, "out_features": 6, "format": 0, "activation": 0}
    arguments |= changes
    return torch.ops.minilm_fast.linear(x, arguments.pop("weight"), bias, *arguments.values())


def head_op(x: torch.Tensor, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {
        "weight": ops.pack_weight(torch.randn(6, 8)).data,
        "bias": torch.zeros(6),
        "vocab_size": 6,
        "format": 0,
        "k": 2,
        "banned": None,
        "suppress_id": -1,
        "suppress": None,
    }
    return torch.ops.minilm_fast.lm_head_topk(x, *(arguments | changes).values())


X = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be .*Double", lambda: linear_op(X.double())),
        ("x must have the shape", lambda: linear_op(X[0])),
        ("x has 7 features, but weight takes 8", lambda: linear_op(X[:, :7])),
        ("bias must have the shape", lambda: linear_op(X, torch.zeros(5))),
        ("bias must be .*BFloat16", lambda: linear_op(X, torch.zeros(6).bfloat16())),
        ("weight has 6 output features, but 5", lambda: linear_op(X, out_features=5)),
        ("weight was packed as fp32, but format is int8", lambda: linear_op(X, format=2)),
        ("format must be", lambda: linear_op(X, format=3)),
        ("activation must be", lambda: linear_op(X, activation=2)),
        ("weight must be a vector made by pack_weight", lambda: linear_op(X, weight=torch.randn(6, 8))),
        ("weight was not made by", lambda: linear_op(X, weight=torch.zeros(500, dtype=torch.uint8))),
        (
            "weight is cut off",
            lambda: linear_op(X, weight=ops.pack_weight(torch.randn(6, 8)).data[:-1]),
        ),
        ("weight must have the shape", lambda: torch.ops.minilm_fast.pack_weight(X[0], 0)),
        ("weight must not be empty", lambda: ops.pack_weight(torch.zeros(4, 0))),
        ("weight must be .*Long", lambda: torch.ops.minilm_fast.pack_weight(X.long(), 0)),
        ("format must be", lambda: torch.ops.minilm_fast.pack_weight(X, -1)),
        ("weight must be finite", lambda: ops.pack_weight(X / 0, "int8")),
        ("k must be from 1 to the vocabulary's 6, got 7", lambda: head_op(X, k=7)),
        ("k must be from 1", lambda: head_op(X, k=0)),
        ("bias must have the shape", lambda: head_op(X, bias=torch.zeros(7))),
        ("banned must be .*Long", lambda: head_op(X, banned=torch.zeros(3, 2).long())),
        ("banned must have the shape", lambda: head_op(X, banned=torch.zeros(2, 2).int())),
        ("banned holds the id 6", lambda: head_op(X, banned=torch.full((3, 2), 6).int())),
        ("suppress must be", lambda: head_op(X, suppress_id=1, suppress=torch.zeros(3))),
        ("suppress must have the shape", lambda: head_op(X, suppress_id=1, suppress=torch.zeros(2).bool())),
        ("suppress_id must be from 0 to 5, got -1", lambda: head_op(X, suppress=torch.zeros(3).bool())),
    ],
)
def test_bad_arguments_name_the_culprit(message: str, call: object) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]


def test_instruction_sets_agree() -> None:
    """Nothing of one instruction set leaks into another: bf16 with matrix tiles rounds as without."""
    x, weight, bias = problem(33, 100, 384)
    outs = []
    for isa in ISAS:
        with instruction_set(isa):
            outs.append(run(x, weight, bias, "bf16"))
    for out in outs:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)
    assert BEST_ISA in ISAS

"""The CUDA operators of a decoding step around its attention, emulated on a CPU, against their specification."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from emulated_cuda import kernel_before, operators, poisoned_results, running_backwards, written_late
from step_cases import EPS, Arguments, check_embedding, check_linear, check_norm, embedding, linear

from minilm_fast import ops
from minilm_fast.ops import reference

DTYPES = (torch.bfloat16, torch.float16)


def _check(arguments: Arguments) -> None:
    with poisoned_results():
        out, normal = operators().step_linear(*arguments.values())
        with running_backwards():
            again = operators().step_linear(*arguments.values())
    assert torch.equal(out, again[0]) and torch.equal(normal, again[1])
    check_linear(arguments, out, normal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_every_combination(dtype: torch.dtype, norm: bool, residual: bool, gelu: bool, wide: bool) -> None:
    _check(linear(19, 136, 40, dtype, norm=norm, residual=residual, gelu=gelu, wide=wide))


# Such that each shape of tile is the cheapest for some; features up to the largest number of slabs, and parts of one.
SHAPES = [
    (1, 8, 8),
    (1, 384, 24),
    (10, 1024, 16),
    (17, 520, 72),
    (33, 776, 40),
    (65, 64, 72),
    (70, 384, 384),
    (130, 128, 520),
    (70, 1024, 648),
    (200, 136, 776),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES)
def test_shapes(rows: int, features: int, outputs: int, norm: bool) -> None:
    dtype = DTYPES[rows % 2]
    _check(linear(rows, features, outputs, dtype, norm=norm, residual=not norm, gelu=norm, wide=not norm))


def test_many_features() -> None:
    _check(linear(3, 4096, 8, torch.bfloat16, norm=False, residual=True, gelu=False, wide=True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("rows", "features", "outputs"), [(1, 8, 8), (10, 1024, 16), (70, 384, 384), (200, 136, 776)])
def test_an_early_kernel_reads_only_the_weight_before_the_others_end(
    rows: int, features: int, outputs: int, norm: bool
) -> None:
    arguments = linear(rows, features, outputs, torch.bfloat16, norm=norm, residual=True, gelu=True, wide=True)
    plain = operators().step_linear(*arguments.values())
    written = {name: arguments[name] for name in ("x", "bias", "residual", "norm_weight", "norm_bias")}
    for order in (nullcontext, running_backwards):
        empty, fill = written_late(written)
        with order(), kernel_before(fill):
            early = operators().step_linear(*(arguments | empty | {"early": True}).values())
        assert all(map(torch.equal, plain, early))


def test_an_early_norm_reads_nothing_before_the_others_end() -> None:
    written = {"x": torch.randn(9, 384), "weight": torch.randn(384), "bias": torch.randn(384)}
    plain = operators().step_norm(*written.values(), EPS, torch.bfloat16, False)
    empty, fill = written_late(written)
    with kernel_before(fill):
        assert torch.equal(plain, operators().step_norm(*empty.values(), EPS, torch.bfloat16, True))


@pytest.mark.parametrize("norm", [False, True])
def test_results_do_not_depend_on_the_other_rows(norm: bool) -> None:
    """Nor on the tile, which the number of rows decides."""
    arguments = linear(200, 264, 264, torch.bfloat16, norm=norm, residual=True, gelu=True, wide=True)
    together = operators().step_linear(*arguments.values())
    for rows in ([0], [199, 3, 64], list(range(0, 200, 5))):
        part = arguments | {name: arguments[name][rows].contiguous() for name in ("x", "residual")}
        out, normal = operators().step_linear(*part.values())
        assert torch.equal(out, together[0][rows])
        assert not norm or torch.equal(normal, together[1][rows])


@pytest.mark.parametrize("norm", [False, True])
def test_no_rows(norm: bool) -> None:
    out, normal = operators().step_linear(
        *linear(0, 16, 24, torch.float16, norm=norm, residual=True, gelu=True, wide=False).values()
    )
    assert out.shape == (0, 24) and normal.shape == (0, 16)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    arguments = linear(20, 128, 16, torch.bfloat16, norm=True, residual=False, gelu=False, wide=False)
    plain = operators().step_linear(*arguments.values())
    arguments["x"][7, 3] = float("inf")
    found = operators().step_linear(*arguments.values())
    others = [i for i in range(20) if i != 7]
    for mine, theirs in zip(found, plain, strict=True):
        assert mine[7].isnan().all() and torch.equal(mine[others], theirs[others])


def test_a_norm_of_rows_far_from_zero() -> None:
    """Numbers of 1000 +- 1: a variance from sums of squares would have lost its digits."""
    torch.manual_seed(0)
    x = 1000 + torch.randn(5, 384)
    weight, bias = torch.randn(2, 384)
    out = operators().step_norm(x, weight, bias, EPS, torch.float16, False)
    exact = reference.step_norm(x.double(), weight, bias, EPS, torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (5, 384), (6, 1024), (3, 136), (0, 16)])
def test_norm_alone(dtype: torch.dtype, rows: int, channels: int) -> None:
    torch.manual_seed(channels)
    x = torch.randn(rows, 2, channels)[:, 1]
    weight, bias = torch.randn(2, channels)
    with poisoned_results():
        out = operators().step_norm(x, weight, bias, EPS, dtype, False)
    assert out.dtype == dtype
    check_norm(x, weight, bias, out)


@pytest.mark.parametrize("channels", [8, 384, 1024])
@pytest.mark.parametrize("mask_id", [-1, 4])
@pytest.mark.parametrize("types", [0, 2])
def test_embedding(channels: int, mask_id: int, types: int) -> None:
    arguments = embedding(channels, mask_id, types=types)
    with poisoned_results():
        out = operators().step_embedding(*arguments.values())
    assert out.shape == (6 if mask_id < 0 else 12, channels)
    check_embedding(arguments, out)
    with running_backwards():
        assert torch.equal(out, operators().step_embedding(*arguments.values()))


def test_embedding_outside_the_tables_is_no_number() -> None:
    arguments = embedding(16)
    arguments["last_ids"][0, 1] = 9
    arguments["last_ids"][1, 0] = -1
    arguments["steps"][2] = 8
    out = operators().step_embedding(*arguments.values())
    wrong = out.isnan().all(1).nonzero().flatten().tolist()
    assert wrong == [2, 4, 9, 11] and out.isnan().any(1).sum() == 4


def test_no_embeddings() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    changes = {"last_ids": torch.zeros(0, 2, dtype=torch.int32), "slots": empty, "steps": empty}
    assert operators().step_embedding(*(embedding(8) | changes).values()).shape == (0, 8)


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 16)}, "x must be"),
        ({"x": torch.zeros(2, 24, dtype=HALF)}, "x must have the shape"),
        ({"x": torch.zeros(16, 2, dtype=HALF).t()}, "the last dimension of x must be contiguous"),
        ({"x": torch.zeros(2, 20, dtype=HALF)[:, :16]}, "the rows of x must start at multiples of 16 bytes"),
        ({"x": torch.zeros(40, dtype=HALF)[4:36].view(2, 16)}, "x must start at a multiple of 16 bytes"),
        ({"weight": torch.zeros(24, 16)}, "weight must be"),
        ({"weight": torch.zeros(16, 24, dtype=HALF).t()}, "weight must be contiguous"),
        ({"weight": torch.zeros(20, 16, dtype=HALF)}, "weight must have a multiple of 8 rows"),
        ({"weight": torch.zeros(24, 12, dtype=HALF)}, "the rows of weight must be multiples of 8"),
        ({"bias": torch.zeros(16)}, "bias must have the shape"),
        ({"bias": torch.zeros(24, dtype=HALF)}, "bias must be"),
        ({"residual": torch.zeros(2, 24)}, "residual must be"),
        ({"residual": torch.zeros(3, 24, dtype=HALF)}, "residual must have the shape"),
        ({"norm_weight": torch.zeros(16)}, "norm_weight and norm_bias go together"),
        ({"norm_weight": torch.zeros(16), "norm_bias": torch.zeros(16)}, "x must be"),
        (
            {"norm_weight": torch.zeros(8), "norm_bias": torch.zeros(16), "x": torch.zeros(2, 16)},
            "norm_weight must have the shape",
        ),
        (
            {
                "norm_weight": torch.zeros(1032),
                "norm_bias": torch.zeros(1032),
                "x": torch.zeros(2, 1032),
                "weight": torch.zeros(24, 1032, dtype=HALF),
            },
            "the rows of x must have at most 1024",
        ),
        ({"activation": 2}, "activation must be"),
    ],
)
def test_bad_arguments_of_linear(changes: Arguments, message: str) -> None:
    arguments = linear(2, 16, 24, HALF, norm=False, residual=False, gelu=False, wide=False)
    with pytest.raises(RuntimeError, match=f"step_linear: .*{message}"):
        operators().step_linear(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"last_ids": torch.zeros(3, 2)}, "last_ids must be"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots must have the shape"),
        ({"steps": torch.zeros(3)}, "steps must be"),
        ({"source_lengths": torch.zeros(5)}, "source_lengths must be"),
        ({"word": torch.zeros(9, 12)}, "the rows of word must be multiples of 8"),
        ({"word": torch.zeros(9, 2048)}, "the rows of word must have at most 1024"),
        ({"position": torch.zeros(9, 24)}, "position must have the shape"),
        ({"type": torch.zeros(9, 24)}, "type must have the shape"),
        ({"type_id": 2}, "type_id must be from 0 to 1"),
        ({"weight": torch.zeros(24)}, "weight must have the shape"),
        ({"dtype": torch.float32}, "dtype must be fp16 or bf16"),
    ],
)
def test_bad_arguments_of_embedding(changes: Arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"step_embedding: .*{message}"):
        operators().step_embedding(*(embedding(16) | changes).values())


def test_bad_arguments_of_the_norm() -> None:
    weight = torch.zeros(16)
    for x, dtype, message in (
        (torch.zeros(2, 16, dtype=HALF), HALF, "x must be"),
        (torch.zeros(2, 16), torch.float32, "dtype must be fp16 or bf16"),
        (torch.zeros(2, 24), HALF, "weight must have the shape"),
    ):
        with pytest.raises(RuntimeError, match=f"step_norm: {message}"):
            operators().step_norm(x, weight, weight, EPS, dtype, False)


def test_in_plain_pytorch() -> None:
    """The public functions over the specification, in fp32 and with the weight of the reference."""
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 12), torch.randn(3, 20), torch.randn(20, 12)
    bias, scale, shift = torch.randn(20), torch.randn(12), torch.randn(12)
    with ops.backend("reference"):
        packed = ops.pack_weight(weight)
        out, normal = ops.step_linear(
            x, packed, bias, norm=(scale, shift, EPS), residual=residual, activation="gelu", wide=True
        )
        same = ops.step_norm(x, scale, shift, EPS, torch.float32)
    expected = torch.nn.functional.layer_norm(x, (12,), scale, shift, EPS)
    torch.testing.assert_close(normal, expected)
    assert torch.equal(normal, same)
    y = expected @ weight.t() + bias
    torch.testing.assert_close(out, y * 0.5 * (1 + torch.erf(y * math.sqrt(0.5))) + residual)


def test_a_weight_for_the_cpu_is_refused() -> None:
    if ops.pack_weight(torch.zeros(8, 8)).backend != "cpu":
        pytest.skip("the extension is not built")
    with pytest.raises(ValueError, match="step_linear: weight was packed for the backend cpu"):
        ops.step_linear(torch.zeros(1, 8), ops.pack_weight(torch.zeros(8, 8)))
    with ops.backend("reference"):
        packed = ops.pack_weight(torch.zeros(8, 8))
        with pytest.raises(ValueError, match="step_linear: unknown activation 'tanh'"):
            ops.step_linear(torch.zeros(1, 8), packed, activation="tanh")

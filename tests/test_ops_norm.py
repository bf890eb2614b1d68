"""The C++ norm and GELU fusions against their specifications."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, EPSILON, ISAS, assert_accurate, instruction_set, threads, wide

from minilm_fast import ops
from minilm_fast.ops import reference

EPS = 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [None, *DTYPES])
@pytest.mark.parametrize("channels", [1, 3, 16, 63, 64, 65, 384, 1000])
def test_add_layer_norm(isa: str, dtype: torch.dtype, residual_dtype: torch.dtype | None, channels: int) -> None:
    torch.manual_seed(channels)
    x = (torch.randn(11, channels) * 3 + 5).to(dtype)
    residual = None if residual_dtype is None else torch.randn(11, channels).to(residual_dtype)
    weight, bias = torch.randn(2, channels).unbind()
    with instruction_set(isa):
        out = ops.add_layer_norm(x, residual, weight, bias, EPS)
    eager = reference.add_layer_norm(x, residual, weight, bias, EPS)
    assert_accurate(out, eager, reference.add_layer_norm(*wide(x, residual, weight, bias), EPS))


@pytest.mark.parametrize("isa", ISAS)
def test_variance_of_numbers_far_from_zero(isa: str) -> None:
    """The variance is taken around the mean: the difference of squares would be all noise here."""
    torch.manual_seed(0)
    x = torch.randn(5, 384) + 1e4
    weight, bias = torch.ones(384), torch.zeros(384)
    with instruction_set(isa):
        out = ops.add_layer_norm(x, None, weight, bias, EPS)
    exact = reference.add_layer_norm(*wide(x, None, weight, bias), EPS)
    # The mean in fp32 is good to half a unit in the last place of 1e4, which is 5e-4.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 17, 64, 1536])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_gelu(isa: str, dtype: torch.dtype, channels: int, with_bias: bool) -> None:
    torch.manual_seed(channels)
    x = (torch.randn(11, channels) * 3).to(dtype)
    bias = torch.randn(channels) if with_bias else None
    with instruction_set(isa):
        out = ops.bias_gelu(x, bias)
    assert_accurate(out, reference.bias_gelu(x, bias), reference.bias_gelu(*wide(x, bias)))


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_everywhere(isa: str) -> None:
    x = torch.linspace(-30, 30, 600_001)[:, None]
    with instruction_set(isa):
        out = ops.bias_gelu(x)
    exact = (x.double() * torch.erfc(x.double() * -(0.5**0.5)) / 2)[x.abs() < 12]
    ours = out.double()[x.abs() < 12]
    assert ((ours - exact).abs() <= 40 * EPSILON * exact.abs() + 1e-37).all(), "relative, in the tails as well"
    assert torch.equal(out[x >= 12], x[x >= 12])
    assert (out[x <= -12].abs() < 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_of_what_is_not_finite(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    with instruction_set(isa):
        out = ops.bias_gelu(torch.tensor([[inf, -inf, nan, 0.0]]))[0]
    assert out[0] == inf and abs(out[1]) < 1e-30 and out[2].isnan() and out[3] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [1, 48, 50, 384])
@pytest.mark.parametrize("typed", [False, True])
def test_embed_layer_norm(isa: str, channels: int, typed: bool) -> None:
    torch.manual_seed(channels)
    word, position, kind = (torch.randn(rows, channels) for rows in (40, 20, 2))
    ids, positions, types = (torch.randint(0, rows, (30,), dtype=torch.int32) for rows in (40, 20, 2))
    tables = (word, position, kind if typed else None)
    weight, bias = torch.randn(2, channels).unbind()
    indices = (ids, positions, types if typed else None)
    with instruction_set(isa):
        out = ops.embed_layer_norm(*indices, *tables, weight, bias, EPS)
    eager = reference.embed_layer_norm(*indices, *tables, weight, bias, EPS)
    assert_accurate(out, eager, reference.embed_layer_norm(*indices, *wide(*tables, weight, bias), EPS))


@given(st.integers(0, 400), st.integers(1, 70), st.sampled_from(ISAS), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=50)
def test_rows_are_independent(rows: int, channels: int, isa: str, dtype: torch.dtype) -> None:
    """Bitwise: each row alone gives what it gives among others, whatever the strides and the threads."""
    padded = torch.randn(rows, channels + 3).to(dtype)
    x = padded[:, :channels]
    weight, bias = torch.randn(2, channels).unbind()
    with instruction_set(isa):
        with threads(3):
            norm = ops.add_layer_norm(x, x, weight, bias, EPS)
            activated = ops.bias_gelu(x, bias)
        for row in {0, rows // 2, rows - 1} if rows else ():
            alone = x[row : row + 1].contiguous()
            assert torch.equal(ops.add_layer_norm(alone, alone, weight, bias, EPS)[0], norm[row])
            assert torch.equal(ops.bias_gelu(alone, bias)[0], activated[row])
    assert norm.shape == activated.shape == x.shape


def test_opcheck() -> None:
    namespace = torch.ops.minilm_fast
    x, vector = torch.randn(4, 8), torch.randn(8)
    torch.library.opcheck(namespace.add_layer_norm.default, (x, x + 1, vector, vector, EPS))
    torch.library.opcheck(namespace.add_layer_norm.default, (x.bfloat16(), None, vector, vector, EPS))
    torch.library.opcheck(namespace.bias_gelu.default, (x, vector))
    torch.library.opcheck(namespace.bias_gelu.default, (x, None))
    ids = torch.tensor([3, 0], dtype=torch.int32)
    torch.library.opcheck(namespace.embed_layer_norm.default, (ids, ids, ids, x, x, x, vector, vector, EPS))


X, VECTOR, IDS = torch.zeros(4, 8), torch.zeros(8), torch.tensor([3, 0], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("add_layer_norm", (X[0], None, VECTOR, VECTOR, EPS), "x must be"),
        ("add_layer_norm", (X.double(), None, VECTOR, VECTOR, EPS), "x must be"),
        ("add_layer_norm", (X.t(), None, VECTOR[:4], VECTOR[:4], EPS), "last dimension of x"),
        ("add_layer_norm", (X, X[:3], VECTOR, VECTOR, EPS), "residual must have the shape"),
        ("add_layer_norm", (X, X, VECTOR[:7], VECTOR, EPS), "weight must have the shape"),
        ("add_layer_norm", (X, X, VECTOR, VECTOR.bfloat16(), EPS), "bias must be"),
        ("bias_gelu", (X[None], None), "x must be"),
        ("bias_gelu", (X, VECTOR[:7]), "bias must have the shape"),
        ("embed_layer_norm", (IDS.long(), IDS, None, X, X, None, VECTOR, VECTOR, EPS), "ids must be"),
        ("embed_layer_norm", (IDS, IDS[:1], None, X, X, None, VECTOR, VECTOR, EPS), "positions must have the shape"),
        ("embed_layer_norm", (IDS, IDS, None, X[:3], X, None, VECTOR, VECTOR, EPS), r"ids\[0\] is 3, word has 3"),
        ("embed_layer_norm", (IDS, IDS - 1, None, X, X, None, VECTOR, VECTOR, EPS), r"positions\[1\] is -1"),
        ("embed_layer_norm", (IDS, IDS, IDS, X, X, X[:1], VECTOR, VECTOR, EPS), r"types\[0\] is 3, type has 1"),
        ("embed_layer_norm", (IDS, IDS, None, X, X[:, :7], None, VECTOR, VECTOR, EPS), "position must have the shape"),
    ],
)
def test_bad_arguments(name: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.minilm_fast, name)(*arguments)

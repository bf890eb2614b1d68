"""The Triton kernels of the norm and GELU fusions against their specifications, and the bits of dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from triton_checks import DEVICE, DTYPES, assert_accurate, triton_backend

from minilm_fast import ops
from minilm_fast.errors import UserError
from minilm_fast.ops import _triton, reference
from minilm_fast.ops.dropout import dropout_factors

EPS = 1e-5
SEED = torch.tensor([2**61 + 2**40 + 2**31 + 12345])
ROWS = 37
Optional = torch.Tensor | None


def gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[Optional], upstream: torch.Tensor, *options: Any
) -> list[Optional]:
    """The result of ``function(*inputs, *options)`` and the gradient of each input that is a tensor."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *options)
    grads = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], upstream.to(out.dtype)))
    return [out.detach(), *(None if x is None else next(grads) for x in leaves)]


def check(
    triton: Callable[..., Any], eager: Callable[..., Any], inputs: list[Optional], upstream: torch.Tensor
) -> None:
    with triton_backend():
        ours = gradients(triton, inputs, upstream)
    wide = [None if x is None else x.double() for x in inputs]
    for results in zip(
        ours, gradients(eager, inputs, upstream), gradients(eager, wide, upstream.double()), strict=True
    ):
        assert_accurate(*results)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 2 + 0.5).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "with_bias"), [(1, True), (17, False), (300, True)])
def test_bias_gelu(dtype: torch.dtype, channels: int, with_bias: bool) -> None:
    x = normal(ROWS, channels + 3, dtype=dtype)[:, :channels]
    inputs: list[Optional] = [x, normal(channels) if with_bias else None]
    check(ops.bias_gelu, reference.bias_gelu, inputs, normal(channels, ROWS, dtype=dtype).t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [None, *DTYPES[:2]])
@pytest.mark.parametrize(("channels", "dropout"), [(3, 0.0), (130, 0.1), (384, 0.5)])
def test_dropout_add_layer_norm(
    dtype: torch.dtype, residual: torch.dtype | None, channels: int, dropout: float
) -> None:
    x = normal(ROWS, channels, dtype=dtype)
    other = None if residual is None else normal(ROWS, channels + 1, dtype=residual)[:, 1:]
    vectors = [normal(channels), normal(channels, 1)[:, 0], None if residual is None else normal(1, channels)[0]]

    def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            x: torch.Tensor, residual: Optional, weight: torch.Tensor, bias: torch.Tensor, x_bias: Optional
        ) -> Any:
            return function(x, residual, weight, bias, EPS, dropout, SEED, x_bias)

        return call

    ours, eager = (with_options(m.dropout_add_layer_norm) for m in (ops, reference))
    check(ours, eager, [x, other, *vectors], normal(ROWS, channels, dtype=dtype))


def test_no_rows() -> None:
    x = torch.empty(0, 8, device=DEVICE)
    with triton_backend():
        out, x_grad, bias = gradients(ops.bias_gelu, [x, normal(8)], x)
        normed = gradients(lambda x, *v: ops.dropout_add_layer_norm(x, x, *v, EPS), [x, normal(8), normal(8)], x)
    assert out is not None and x_grad is not None and out.shape == x_grad.shape == (0, 8)
    assert bias is not None and torch.equal(bias, torch.zeros_like(bias))
    assert all(v is not None and torch.equal(v, torch.zeros_like(v)) for v in normed[2:])


@pytest.mark.parametrize("channels", [20, 300])
def test_dropped_elements(channels: int) -> None:
    """Which ones they are: bitwise those of the specification, whatever the halves of the seed."""
    for seed in (SEED, torch.tensor([7]), torch.tensor([2**62 - 1])):
        x = torch.ones(50, channels, device=DEVICE, requires_grad=True)
        vectors = torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE)
        with triton_backend():
            ops.dropout_add_layer_norm(x, None, *vectors, EPS, 0.3, seed).square().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad == 0, dropout_factors(0.3, seed, 50, channels, device=DEVICE)[0] == 0)


def test_opcheck() -> None:
    x, vector = normal(6, 8), normal(8).requires_grad_()
    leaves = [t.requires_grad_() for t in (x, normal(6, 8))]
    with triton_backend():
        torch.library.opcheck(torch.ops.minilm_fast.triton_bias_gelu.default, (x, vector))
        torch.library.opcheck(
            torch.ops.minilm_fast.triton_dropout_add_layer_norm.default,
            (*leaves, vector, vector, EPS, 0.1, SEED, vector),
        )


X, VECTOR = torch.zeros(4, 8, device=DEVICE), torch.zeros(8, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dropout_add_layer_norm", (X.double(), None, VECTOR, VECTOR, EPS, 0.0, None, None), "x must be"),
        ("dropout_add_layer_norm", (X.t(), None, VECTOR[:4], VECTOR[:4], EPS, 0.0, None, None), "last dimension of x"),
        ("dropout_add_layer_norm", (X, X[:3], VECTOR, VECTOR, EPS, 0.0, None, None), "residual must have the shape"),
        ("dropout_add_layer_norm", (X, X, VECTOR[:7], VECTOR, EPS, 0.0, None, None), "weight must have the shape"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR.bfloat16(), EPS, 0.0, None, None), "bias must be"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 0.0, None, VECTOR[:3]), "x_bias must have the shape"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 0.1, None, None), "dropout needs a seed"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 0.1, SEED.int(), None), "seed must be"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 1.0, SEED, None), "dropout must be"),
        ("bias_gelu_backward", (X[:3], X, None), "grad must have the shape"),
        ("bias_gelu", (X[0], None), "x must be a matrix"),
    ],
)
def test_bad_arguments(name: str, arguments: tuple[object, ...], message: str) -> None:
    with triton_backend(), pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.minilm_fast, f"triton_{name}")(*arguments)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.backend("triton"):
        with pytest.raises(UserError, match="tensors are on cpu"):
            ops.bias_gelu(x)
        with pytest.raises(UserError, match="no triton implementation"):
            ops.embed_layer_norm(*[x[0].int()] * 2, None, x, x, None, VECTOR, VECTOR, EPS)
    monkeypatch.setattr(_triton, "_missing", lambda: "triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ops.backend("triton"), pytest.raises(UserError, match="triton is not installed"):
        ops.bias_gelu(x)

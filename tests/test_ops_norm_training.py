"""Gradients of the norm and GELU fusions against their specifications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, EPSILON, ISAS, assert_accurate, instruction_set, threads, wide

from minilm_fast import backend, ops
from minilm_fast.ops import reference

EPS = 1e-5
SEED = torch.tensor([2**40 + 12345])
Optional = torch.Tensor | None


def gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[Optional], upstream: torch.Tensor, *options: Any
) -> list[Optional]:
    """The result of ``function(*inputs, *options)`` and the gradient of each input that is a tensor."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, *options)
    given = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad(out, given, upstream.to(out.dtype)))
    return [out.detach(), *(None if x is None else next(grads) for x in leaves)]


def norm_with(function: Callable[..., torch.Tensor], dropout: float) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, residual: Optional, weight: torch.Tensor, bias: torch.Tensor, x_bias: Optional) -> Any:
        return function(x, residual, weight, bias, EPS, dropout, SEED, x_bias)

    return call


def norm_inputs(rows: int, channels: int, dtype: torch.dtype, residual: torch.dtype | None) -> list[Optional]:
    torch.manual_seed(channels)
    x = (torch.randn(rows, channels) * 3 + 1).to(dtype)
    other = None if residual is None else torch.randn(rows, channels).to(residual)
    return [x, other, *torch.randn(3, channels).unbind()]


def assert_all_accurate(ours: list[Optional], eager: list[Optional], exact: list[Optional]) -> None:
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        if mine is None:
            assert right is None
        else:
            assert theirs is not None and right is not None
            assert mine.dtype == theirs.dtype
            assert_accurate(mine, theirs, right)


@pytest.mark.parametrize("isa", ISAS[:3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [None, *DTYPES])
@pytest.mark.parametrize("channels", [3, 17, 127, 128, 384, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_add_layer_norm(
    isa: str, dtype: torch.dtype, residual_dtype: torch.dtype | None, channels: int, dropout: float
) -> None:
    inputs = norm_inputs(70, channels, dtype, residual_dtype)
    upstream = torch.randn(70, channels).to(dtype)
    with instruction_set(isa):
        ours = gradients(norm_with(ops.dropout_add_layer_norm, dropout), inputs, upstream)
    specification = norm_with(reference.dropout_add_layer_norm, dropout)
    eager = gradients(specification, inputs, upstream)
    assert_all_accurate(ours, eager, gradients(specification, wide(*inputs), upstream.double()))


@pytest.mark.parametrize("isa", ISAS[:3])
def test_one_channel(isa: str) -> None:
    """Its normalised value is 0 whatever the input, so all but the bias has the gradient 0, up to rounding."""
    inputs = norm_inputs(70, 1, torch.float32, torch.float32)
    upstream = torch.randn(70, 1)
    with instruction_set(isa):
        out, x, residual, weight, bias, x_bias = gradients(norm_with(ops.dropout_add_layer_norm, 0.1), inputs, upstream)
    assert out is not None and bias is not None and inputs[3] is not None
    assert torch.equal(out, inputs[3].expand(70, 1))
    torch.testing.assert_close(bias, upstream.sum(0))
    for grad in (x, residual, weight, x_bias):
        assert grad is not None
        assert grad.abs().max() <= 70 * 4 * EPSILON * EPS**-0.5


@pytest.mark.parametrize("isa", ISAS[:3])
def test_dropped_elements(isa: str) -> None:
    """Which ones they are: bitwise those of the specification; the weight and bias make the sum visible."""
    x = torch.ones(300, 260)
    factors = ops.dropout.dropout_factors(0.3, SEED, 300, 260)[0]
    with instruction_set(isa):
        x.requires_grad_()
        ops.dropout_add_layer_norm(x, None, torch.ones(260), torch.zeros(260), EPS, 0.3, SEED).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, factors == 0)


@pytest.mark.parametrize("isa", ISAS[:3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 17, 384, 1000, 1536])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_gelu(isa: str, dtype: torch.dtype, channels: int, with_bias: bool) -> None:
    torch.manual_seed(channels)
    x = (torch.randn(70, channels) * 2).to(dtype)
    inputs = [x, torch.randn(channels) if with_bias else None]
    upstream = torch.randn(70, channels).to(dtype)
    with instruction_set(isa):
        ours = gradients(ops.bias_gelu, inputs, upstream)
    eager = gradients(reference.bias_gelu, inputs, upstream)
    assert_all_accurate(ours, eager, gradients(reference.bias_gelu, wide(*inputs), upstream.double()))


@pytest.mark.parametrize("isa", ISAS[:3])
def test_gelu_derivative_everywhere(isa: str) -> None:
    x = torch.linspace(-30, 30, 600_001)[:, None]
    with instruction_set(isa):
        ours = gradients(ops.bias_gelu, [x], torch.ones_like(x))[1]
    assert ours is not None
    v = x.double()
    density = torch.exp(-v * v / 2) / (2 * torch.pi) ** 0.5
    exact = torch.erfc(v * -(0.5**0.5)) / 2 + v * density
    error = (ours.double() - exact).abs()
    # Near 0 of the derivative, at -0.75, its two parts cancel: what counts there is their size.
    bound = 4 * EPSILON * torch.where(v < 0, v.abs() * density * (1 + v * v) + exact.abs(), 1.0) + 1e-35
    assert (error <= bound)[v.abs() < 12].all()
    assert (ours[x >= 12] == 1).all()
    assert (ours[x <= -12].abs() < 1e-30).all()


@pytest.mark.parametrize("isa", ISAS[:3])
def test_gelu_derivative_of_what_is_not_finite(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    with instruction_set(isa):
        x_grad = gradients(ops.bias_gelu, [torch.tensor([[inf, -inf, nan, 0.0]])], torch.ones(1, 4))[1]
    assert x_grad is not None
    got = x_grad[0].tolist()
    assert got[0] == 1 and abs(got[1]) < 1e-30 and got[2] != got[2] and abs(got[3] - 0.5) <= EPSILON


@given(st.integers(0, 300), st.integers(1, 200), st.sampled_from(ISAS[:3]), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=30)
def test_threads_change_nothing(rows: int, channels: int, isa: str, dtype: torch.dtype) -> None:
    """Bitwise, the sums over rows included."""
    inputs = norm_inputs(rows, channels, dtype, torch.float32)
    upstream = torch.randn(rows, channels).to(dtype)
    norm = norm_with(ops.dropout_add_layer_norm, 0.2)
    results = []
    with instruction_set(isa):
        for count in (1, 2, 3):
            with threads(count):
                results.append(
                    gradients(norm, inputs, upstream) + gradients(ops.bias_gelu, [inputs[0], inputs[2]], upstream)
                )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


def test_strided_inputs_and_gradients() -> None:
    inputs = norm_inputs(20, 48, torch.float32, torch.float32)
    padded = [torch.cat([x, x], 1)[:, :48] if x is not None and x.dim() == 2 else x for x in inputs]
    upstream = torch.randn(48, 20).t()
    norm = norm_with(ops.dropout_add_layer_norm, 0.1)
    for a, b in zip(gradients(norm, inputs, upstream.contiguous()), gradients(norm, padded, upstream), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    expanded = gradients(ops.bias_gelu, padded[:1], torch.ones(1, 1).expand(20, 48))
    assert expanded[1] is not None
    torch.testing.assert_close(expanded[1], gradients(reference.bias_gelu, inputs[:1], torch.ones(20, 48))[1])


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, residual, weight, bias, x_bias = norm_inputs(5, 8, torch.float32, torch.float32)
    assert x is not None and residual is not None and weight is not None and bias is not None
    weight.requires_grad_()
    ops.dropout_add_layer_norm(x, residual, weight, bias, EPS, 0.1, SEED, x_bias).sum().backward()
    assert weight.grad is not None and bias.grad is None and x.grad is None


def test_references_pass_gradcheck() -> None:
    inputs = [x.double().requires_grad_() for x in norm_inputs(4, 6, torch.float32, torch.float32) if x is not None]
    assert torch.autograd.gradcheck(norm_with(reference.dropout_add_layer_norm, 0.3), inputs)
    assert torch.autograd.gradcheck(reference.bias_gelu, (inputs[0], inputs[2]))


def test_kernels_without_the_extension_agree() -> None:
    """The pure PyTorch kernels behind the operators, which are used where nothing is compiled."""
    from minilm_fast.ops import norm

    for residual in (None, torch.float32, torch.bfloat16):
        for dropout, seed in ((0.0, None), (0.2, SEED)):
            x, other, weight, bias, x_bias = norm_inputs(9, 40, torch.float32, residual)
            assert x is not None and weight is not None
            arguments = (x, other, weight, bias, EPS, dropout, seed, x_bias)
            ours, plain = (
                torch.ops.minilm_fast.dropout_add_layer_norm(*arguments),
                norm._dropout_norm_reference(*arguments),
            )
            torch.testing.assert_close(ours, plain)
            backward = (torch.randn(9, 40), x, other, weight, *ours[1:], dropout, seed, x_bias)
            torch.testing.assert_close(
                torch.ops.minilm_fast.dropout_add_layer_norm_backward(*backward),
                norm._dropout_norm_backward_reference(*backward),
            )
            for bias in (None, x_bias):
                torch.testing.assert_close(
                    torch.ops.minilm_fast.bias_gelu_backward(backward[0], x, bias),
                    norm._gelu_backward_reference(backward[0], x, bias),
                )


def test_opcheck() -> None:
    namespace = torch.ops.minilm_fast
    x, vector = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    residual = torch.randn(4, 8, requires_grad=True)
    for arguments in (
        (x, residual, vector, vector, EPS, 0.2, SEED, vector),
        (x, residual, vector, vector, EPS, 0.0, None, None),
        (x, None, vector, vector, EPS, 0.0, None, vector),
        (x.detach().bfloat16().requires_grad_(), residual, vector, vector, EPS, 0.0, None, None),
    ):
        torch.library.opcheck(namespace.dropout_add_layer_norm.default, arguments)
    for bias in (vector, None):
        torch.library.opcheck(namespace.bias_gelu.default, (x, bias))
    for plain in (vector.detach(), None):
        torch.library.opcheck(namespace.bias_gelu_backward.default, (residual.detach(), x.detach(), plain))


def test_backends_can_be_forced() -> None:
    inputs = norm_inputs(6, 16, torch.float32, torch.float32)
    upstream = torch.randn(6, 16)
    with backend("reference"):
        plain = gradients(norm_with(ops.dropout_add_layer_norm, 0.1), inputs, upstream)
    with backend("cpu"):
        compiled = gradients(norm_with(ops.dropout_add_layer_norm, 0.1), inputs, upstream)
    torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-5)


X, VECTOR = torch.zeros(4, 8), torch.zeros(8)


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
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 0.1, SEED[:0], None), "seed must have the shape"),
        ("dropout_add_layer_norm", (X, X, VECTOR, VECTOR, EPS, 1.0, SEED, None), "dropout must be"),
        ("bias_gelu_backward", (X[:3], X, None), "grad must have the shape"),
        ("bias_gelu_backward", (X.bfloat16(), X, None), "grad must be"),
    ],
)
def test_bad_arguments(name: str, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.minilm_fast, name)(*arguments)


def test_bad_dropout() -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        ops.dropout_add_layer_norm(X, None, VECTOR, VECTOR, EPS, 1.5, SEED)
    with pytest.raises(ValueError, match="needs a seed"):
        ops.dropout_add_layer_norm(X, None, VECTOR, VECTOR, EPS, 0.5)

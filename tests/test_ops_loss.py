"""The label-smoothed cross-entropy in C++ against its specification."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, ISAS, assert_accurate, instruction_set, threads, wide

from minilm_fast import ops
from minilm_fast.ops import loss as loss_module
from minilm_fast.ops import reference

Loss = Callable[..., torch.Tensor]


def case(
    rows: int, channels: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """``(hidden, weight, bias)``, labels of which some are 0, and the gradient of each row's loss."""
    torch.manual_seed(rows + channels)
    hidden = torch.randn(rows, channels).to(dtype)
    weight = torch.randn(vocabulary, channels) * 2 / channels**0.5
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::5] = 0
    return [hidden, weight, torch.randn(vocabulary)], labels, torch.randn(rows)


def gradients(
    function: Loss, inputs: list[torch.Tensor], labels: torch.Tensor, smoothing: float, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """The losses and the gradients of hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, labels, smoothing)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def eager_bf16(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """What autocast makes of it: logits in bf16, the loss in fp32."""
    logits = torch.nn.functional.linear(hidden, weight.bfloat16(), bias.bfloat16()).float()
    unit = torch.eye(weight.shape[0])
    return reference.label_smoothed_cross_entropy(logits, unit, torch.zeros_like(bias), labels, smoothing)


SIZES = [(1, 20, 50), (7, 3, 17), (70, 17, 1000), (33, 384, 301), (3, 1000, 128), (600, 40, 130)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "vocabulary"), SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_against_fp64(
    isa: str, dtype: torch.dtype, rows: int, channels: int, vocabulary: int, smoothing: float
) -> None:
    inputs, labels, upstream = case(rows, channels, vocabulary, dtype)
    with instruction_set(isa):
        ours = gradients(ops.label_smoothed_cross_entropy, inputs, labels, smoothing, upstream)
    eager_function = reference.label_smoothed_cross_entropy if dtype == torch.float32 else eager_bf16
    eager = gradients(eager_function, inputs, labels, smoothing, upstream)
    exact = gradients(reference.label_smoothed_cross_entropy, wide(*inputs), labels, smoothing, upstream.double())
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert_accurate(mine, theirs, right)


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_bf16_are_summed_in_fp32(isa: str) -> None:
    """With a weight that bf16 holds exactly nothing but fp32 rounding is left in the loss."""
    (hidden, weight, bias), labels, _ = case(50, 64, 300, torch.bfloat16)
    weight = weight.bfloat16().float()
    with instruction_set(isa):
        ours = ops.label_smoothed_cross_entropy(hidden, weight, bias, labels, 0.1)
        of_bf16 = ops.label_smoothed_cross_entropy(hidden, weight.bfloat16(), bias, labels, 0.1)
    exact = reference.label_smoothed_cross_entropy(*wide(hidden, weight, bias), labels, 0.1)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(ours, of_bf16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smallest_case(smoothing: float) -> None:
    inputs, labels, upstream = case(1, 1, 3)
    labels[:] = 2
    ours = gradients(ops.label_smoothed_cross_entropy, inputs, labels, smoothing, upstream)
    exact = gradients(reference.label_smoothed_cross_entropy, wide(*inputs), labels, smoothing, upstream.double())
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "vocabulary"), [(40, 16, 9001), (40, 1, 33)])
def test_many_words_and_one_channel(isa: str, dtype: torch.dtype, rows: int, channels: int, vocabulary: int) -> None:
    inputs, labels, upstream = case(rows, channels, vocabulary, dtype)
    with instruction_set(isa):
        ours = gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream)
    exact = gradients(reference.label_smoothed_cross_entropy, wide(*inputs), labels, 0.1, upstream.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.double() - right).abs().max() <= bound * right.abs().max()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding(smoothing: float) -> None:
    """With smoothing a row with label 0 costs nothing and leaves no gradient; without, it counts."""
    inputs, labels, _ = case(20, 8, 50)
    labels[:] = 0
    losses, *grads = gradients(ops.label_smoothed_cross_entropy, inputs, labels, smoothing, torch.ones(20))
    nothing = smoothing > 0
    assert bool((losses == 0).all()) is nothing
    for grad in grads:
        assert bool((grad == 0).all()) is nothing
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("isa", ISAS)
def test_large_logits(isa: str) -> None:
    """Far beyond the range of exp: the largest logit is taken out first."""
    inputs, labels, upstream = case(30, 12, 200)
    inputs[1] *= 300
    inputs[2] -= 500
    with instruction_set(isa):
        ours = gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream)
    exact = gradients(reference.label_smoothed_cross_entropy, wide(*inputs), labels, 0.1, upstream.double())
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


def test_nan_comes_through_in_its_row_only() -> None:
    inputs, labels, _ = case(20, 8, 50)
    inputs[0][3] = float("nan")
    assert ops.label_smoothed_cross_entropy(*inputs, labels, 0.0).isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_needs_a_gradient_gets_one(wanted: tuple[int, ...]) -> None:
    inputs, labels, upstream = case(21, 8, 300)
    every = gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream)[1:]
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    ops.label_smoothed_cross_entropy(*leaves, labels, 0.1).backward(upstream)
    for i, (leaf, grad) in enumerate(zip(leaves, every, strict=True)):
        assert (leaf.grad is not None) is (i in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, grad)


def test_no_rows() -> None:
    inputs, labels, upstream = case(0, 8, 50)
    losses, hidden, weight, bias = gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream)
    assert losses.shape == (0,) and hidden.shape == (0, 8)
    assert torch.equal(weight, torch.zeros(50, 8)) and torch.equal(bias, torch.zeros(50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    inputs, labels, upstream = case(30, 24, 70, dtype)
    expected = gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream)
    strided = [inputs[0].t().contiguous().t(), inputs[1].t().contiguous().t(), inputs[2]]
    labels = torch.stack([labels, labels], 1)[:, 0]
    again = gradients(ops.label_smoothed_cross_entropy, strided, labels, 0.1, torch.stack([upstream] * 2, 1)[:, 0])
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b)


@given(st.integers(1, 150), st.integers(1, 70), st.integers(3, 700), st.sampled_from(ISAS), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=25)
def test_threads_change_nothing(rows: int, channels: int, vocabulary: int, isa: str, dtype: torch.dtype) -> None:
    inputs, labels, upstream = case(rows, channels, vocabulary, dtype)
    results = []
    with instruction_set(isa):
        for count in (1, 2, 3):
            with threads(count):
                results.append(gradients(ops.label_smoothed_cross_entropy, inputs, labels, 0.1, upstream))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_called_under_autocast() -> None:
    """As in training: hidden states in bf16 from a linear layer, parameters in fp32."""
    (x, weight, bias), labels, _ = case(30, 24, 70)
    layer = torch.nn.Linear(24, 24)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        losses = ops.label_smoothed_cross_entropy(hidden, weight, bias, labels, 0.1)
    assert hidden.dtype == torch.bfloat16 and losses.dtype == torch.float32
    losses.mean().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and layer.weight.grad is not None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_passes_gradcheck(smoothing: float) -> None:
    inputs, labels, _ = case(6, 4, 9)
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: reference.label_smoothed_cross_entropy(*x, labels, smoothing), leaves)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_kernels_without_the_extension_agree(smoothing: float) -> None:
    inputs, labels, upstream = case(11, 16, 60)
    ours = torch.ops.minilm_fast.label_smoothed_cross_entropy(*inputs, labels, smoothing)
    torch.testing.assert_close(ours, loss_module._reference(*inputs, labels, smoothing))
    for wanted in ((True, True, True), (False, True, False)):
        backward = (upstream, *inputs, labels, ours[1], smoothing, *wanted)
        torch.testing.assert_close(
            torch.ops.minilm_fast.label_smoothed_cross_entropy_backward(*backward),
            loss_module._backward_reference(*backward),
        )


def test_opcheck() -> None:
    namespace = torch.ops.minilm_fast
    (hidden, weight, bias), labels, upstream = case(6, 8, 20)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for tensors in (leaves, [hidden.detach().bfloat16().requires_grad_(), weight.detach(), bias]):
        torch.library.opcheck(namespace.label_smoothed_cross_entropy.default, (*tensors, labels, 0.1))
    plain = [x.detach() for x in leaves]
    lse = namespace.label_smoothed_cross_entropy(*plain, labels, 0.1)[1]
    for wanted in ((True, True, True), (True, False, True)):
        arguments = (upstream, *plain, labels, lse, 0.1, *wanted)
        torch.library.opcheck(namespace.label_smoothed_cross_entropy_backward.default, arguments)


HIDDEN, WEIGHT, BIAS, LABELS = torch.zeros(4, 8), torch.zeros(5, 8), torch.zeros(5), torch.tensor([0, 1, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((HIDDEN[0], WEIGHT, BIAS, LABELS, 0.1), ValueError, "does not fit weight"),
        ((HIDDEN, WEIGHT[:, :7], BIAS, LABELS, 0.1), ValueError, "does not fit weight"),
        ((HIDDEN, WEIGHT, BIAS[:4], LABELS, 0.1), ValueError, "do not fit"),
        ((HIDDEN, WEIGHT, BIAS, LABELS[:3], 0.1), ValueError, "do not fit"),
        ((HIDDEN, WEIGHT, BIAS, LABELS, 1.0), ValueError, "below 1"),
        ((HIDDEN, WEIGHT, BIAS, LABELS, float("nan")), ValueError, "below 1"),
        ((HIDDEN, WEIGHT[:2], BIAS[:2], LABELS, 0.1), ValueError, "vocabulary of more than 2"),
        ((HIDDEN, WEIGHT, BIAS, LABELS + 1, 0.1), RuntimeError, r"labels\[3\] is 5, the vocabulary has 5"),
        ((HIDDEN, WEIGHT, BIAS, LABELS - 1, 0.1), RuntimeError, r"labels\[0\] is -1"),
        ((HIDDEN, WEIGHT, BIAS, LABELS.int(), 0.1), RuntimeError, "labels must be"),
        ((HIDDEN.double(), WEIGHT, BIAS, LABELS, 0.1), RuntimeError, "hidden must be"),
        ((HIDDEN, WEIGHT.half(), BIAS, LABELS, 0.1), RuntimeError, "weight must be"),
        ((HIDDEN, WEIGHT, BIAS.bfloat16(), LABELS, 0.1), RuntimeError, "bias must be"),
        ((HIDDEN[:, :0], WEIGHT[:, :0], BIAS, LABELS, 0.1), RuntimeError, "hidden must have channels"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"label_smoothed_cross_entropy: .*{message}"):
        ops.label_smoothed_cross_entropy(*arguments)

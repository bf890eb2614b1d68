"""Output projection and label-smoothed cross-entropy, a block of rows at a time (minilm_fast/ops/loss.py).

The products are PyTorch's: at these shapes they are plain large matrix products, for which cuBLAS is hard to beat, and
what fusing them would save is one pass over a block of logits. The kernels do everything between two products in one
pass each: forward the log-sum-exp and the loss of each row, backward the gradient of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from minilm_fast.kernels.common import check, check_rows, check_vector

CHUNK_BYTES = 2**27
"""Of fp32 logits that exist at a time, and as many rows at least that a product fills the GPU."""
_LEAST_ROWS = 128
_WARPS = 8


@triton.jit(do_not_specialize=["smoothing", "constant"])
def _loss_rows(
    logits, bias, labels, loss, lse, vocabulary, smoothing, constant, BLOCK: tl.constexpr, SMOOTH: tl.constexpr
):
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * vocabulary
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        word = first + tl.arange(0, BLOCK)
        exists = word < vocabulary
        z = tl.load(z_row + word, mask=exists, other=0.0) + tl.load(bias + word, mask=exists, other=0.0)
        plain += z
        z = tl.where(exists, z, float("-inf"))
        now = tl.maximum(maximum, z)
        # A lane without a word yet has the maximum -infinity.
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(maximum - shift) + tl.exp(z - shift)
        maximum = now
    top = tl.max(maximum, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(maximum - top), 0))
    label = tl.load(labels + row)
    # A label that is out of range makes the loss NaN.
    valid = (label >= 0) & (label < vocabulary)
    chosen = tl.load(z_row + label, mask=valid, other=float("nan")) + tl.load(bias + label, mask=valid, other=0.0)
    if SMOOTH:
        padding = tl.load(z_row) + tl.load(bias)
        others = (tl.sum(plain, 0) - padding - chosen) * (smoothing / (vocabulary - 2))
        value = log_sum - (1.0 - smoothing) * chosen - others + constant
        value = tl.where(label == 0, 0.0, value)
    else:
        value = log_sum - chosen
    tl.store(loss + row, value)
    tl.store(lse + row, log_sum)


@triton.jit(do_not_specialize=["smoothing"])
def _loss_gradient(
    grad,
    logits,
    bias,
    labels,
    lse,
    logits_grad,
    grad_stride,
    vocabulary,
    smoothing,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    row = tl.program_id(0)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = word < vocabulary
    place = row.to(tl.int64) * vocabulary + word
    label = tl.load(labels + row)
    upstream = tl.load(grad + row * grad_stride)
    z = tl.load(logits + place, mask=exists, other=0.0) + tl.load(bias + word, mask=exists, other=0.0)
    share = tl.where(word == label, 1.0 - smoothing, 0.0)
    if SMOOTH:
        share = tl.where((word == label) | (word == 0), share, smoothing / (vocabulary - 2))
        upstream = tl.where(label == 0, 0.0, upstream)
    gradient = (tl.exp(z - tl.load(lse + row)) - share) * upstream
    tl.store(logits_grad + place, gradient.to(logits_grad.dtype.element_ty), mask=exists)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a b`` summed and kept in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def _chunk(vocabulary: int) -> int:
    return max(_LEAST_ROWS, CHUNK_BYTES // (4 * vocabulary) // _LEAST_ROWS * _LEAST_ROWS)


def _block(vocabulary: int) -> int:
    return min(2048, max(128, triton.next_power_of_2(vocabulary)))


def _check(
    op: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> None:
    check(hidden.dim() == 2, f"{op}: hidden must be a matrix, got the shape {list(hidden.shape)}")
    check(weight.dim() == 2, f"{op}: weight must be a matrix, got the shape {list(weight.shape)}")
    device = hidden.device
    check_rows(op, "hidden", hidden, hidden.shape, device)
    check_rows(op, "weight", weight, torch.Size((weight.shape[0], hidden.shape[1])), device)
    check_vector(op, "bias", bias, (weight.shape[0],), device)
    check(labels.dtype == torch.int64, f"{op}: labels must be int64, got {labels.dtype}")
    check(labels.device == device, f"{op}: labels must be on {device}, got {labels.device}")
    check(labels.shape == hidden.shape[:1], f"{op}: labels must have the shape {list(hidden.shape[:1])}")
    check(weight.shape[0] > (2 if smoothing > 0 else 0), f"{op}: weight has too few rows, {weight.shape[0]}")


def label_smoothed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Host function of the operator: loss and log-sum-exp of each row, fp32."""
    _check("label_smoothed_cross_entropy", hidden, weight, bias, labels, smoothing)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    transposed, labels = weight.to(hidden.dtype).t(), labels.contiguous()
    kept = torch.tensor([1 - smoothing, smoothing / max(vocabulary - 2, 1)], dtype=torch.float64)
    shares = torch.tensor([1 - smoothing, smoothing], dtype=torch.float64)
    constant = float(torch.xlogy(shares, kept).sum())
    for first in range(0, rows, _chunk(vocabulary)):
        part = slice(first, min(first + _chunk(vocabulary), rows))
        logits = _product(hidden[part], transposed)
        _loss_rows[(logits.shape[0],)](
            logits,
            bias,
            labels[part],
            loss[part],
            lse[part],
            vocabulary,
            smoothing,
            constant,
            _block(vocabulary),
            smoothing > 0,
            num_warps=_WARPS,
        )
    return loss, lse


def label_smoothed_cross_entropy_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    smoothing: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Host function of the operator: the gradients of hidden, weight and bias in fp32, empty where none is wanted."""
    op = "label_smoothed_cross_entropy_backward"
    _check(op, hidden, weight, bias, labels, smoothing)
    check_vector(op, "lse", lse, (hidden.shape[0],), hidden.device)
    check(grad.dtype == torch.float32 and grad.shape == lse.shape, f"{op}: grad must be fp32 {list(lse.shape)}")
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    matrix, labels = weight.to(hidden.dtype), labels.contiguous()

    def zeros(wanted: bool, shape: torch.Size) -> torch.Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=torch.float32, device=hidden.device)

    results = zeros(hidden_grad, hidden.shape), zeros(weight_grad, weight.shape), zeros(bias_grad, bias.shape)
    for first in range(0, rows, _chunk(vocabulary)):
        part = slice(first, min(first + _chunk(vocabulary), rows))
        logits = _product(hidden[part], matrix.t())
        # In place where the types are the same.
        logits_grad = logits if hidden.dtype == torch.float32 else torch.empty_like(logits, dtype=hidden.dtype)
        _loss_gradient[(logits.shape[0], triton.cdiv(vocabulary, _block(vocabulary)))](
            grad[part],
            logits,
            bias,
            labels[part],
            lse[part],
            logits_grad,
            grad.stride(0),
            vocabulary,
            smoothing,
            _block(vocabulary),
            smoothing > 0,
            num_warps=_WARPS,
        )
        if hidden_grad:
            results[0][part] = _product(logits_grad, matrix)
        if weight_grad:
            results[1].add_(_product(logits_grad.t(), hidden[part]))
        if bias_grad:
            results[2].add_(logits_grad.sum(0, dtype=torch.float32))
    return results

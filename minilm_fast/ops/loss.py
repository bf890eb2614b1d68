"""Output projection and label-smoothed cross-entropy, without all logits in memory.

For a row ``h`` with label ``y``, ``z = W h + b`` over a vocabulary of ``V`` and smoothing ``s > 0``::

    q_v  = 1 - s if v = y else 0 if v = 0 else s / (V - 2)
    loss = KL(q || softmax(z)) = lse(z) - sum_v q_v z_v + (1 - s) log(1 - s) + s log(s / (V - 2))

and 0 where ``y = 0``, the padding. With ``s = 0`` it is ``lse(z) - z_y``, for label 0 too. The gradient with respect to
``z_v`` is ``softmax(z)_v - q_v``.

The logits are computed block by block, once in the forward pass, which keeps ``lse(z)`` of each row, and once more in
the backward pass, which makes of each block of them its share of all gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from minilm_fast.ops import _triton, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import LIBRARY, define, define_triton


def _reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = reference.label_smoothed_cross_entropy(hidden, weight, bias, labels, smoothing)
    return loss, (hidden.float() @ weight.float().t() + bias).logsumexp(1)


def _backward_reference(
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
    wide, matrix = hidden.float(), weight.float()
    probability = torch.exp(wide @ matrix.t() + bias - lse[:, None])
    target = torch.zeros_like(probability)
    if smoothing > 0:
        target[:, 1:] = smoothing / (weight.shape[0] - 2)
        grad = grad.masked_fill(labels == 0, 0.0)
    target.scatter_(1, labels[:, None], 1 - smoothing)
    logits_grad = (probability - target) * grad[:, None]
    return (
        logits_grad @ matrix if hidden_grad else bias.new_empty(0),
        logits_grad.t() @ wide if weight_grad else bias.new_empty(0),
        logits_grad.sum(0) if bias_grad else bias.new_empty(0),
    )


def _fake(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
    return bias.new_empty(hidden.shape[:1]), bias.new_empty(hidden.shape[:1])


def _fake_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    smoothing: float,
    *wanted: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients are fp32, empty where none is wanted."""
    return tuple(
        bias.new_empty(x.shape if asked else (0,)) for x, asked in zip((hidden, weight, bias), wanted, strict=True)
    )


_SCHEMA = (
    "label_smoothed_cross_entropy(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, float smoothing) "
    "-> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "label_smoothed_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor labels, "
    "Tensor lse, float smoothing, bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)"
)
_op = define(_SCHEMA, reference=_reference, fake=_fake)
_backward_op = define(_BACKWARD_SCHEMA, reference=_backward_reference, fake=_fake_backward)
_triton_op = define_triton(_SCHEMA, kernels="loss", fake=_fake)
_triton_backward_op = define_triton(_BACKWARD_SCHEMA, kernels="loss", fake=_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.smoothing = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(operator: Any, ctx: Any, grad: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = operator(grad, hidden, weight, bias, labels, lse, ctx.smoothing, *wanted)
    results = (
        g.to(x.dtype) if asked else None for g, x, asked in zip(grads, (hidden, weight, bias), wanted, strict=True)
    )
    return *results, None, None


for _name, _operator in (
    ("label_smoothed_cross_entropy", _backward_op),
    ("triton_label_smoothed_cross_entropy", _triton_backward_op),
):
    torch.library.register_autograd(
        f"minilm_fast::{_name}", partial(_backward, _operator), setup_context=_setup_context, lib=LIBRARY
    )


def label_smoothed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Loss of each row (module docstring), differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: fp32 or bf16 ``[rows, channels]``.
        weight: fp32 or bf16 ``[V, channels]``, the output projection; products are taken in the dtype of ``hidden``
            and summed in fp32.
        bias: fp32 ``[V]``.
        labels: int64 ``[rows]``, each in ``[0, V)``; on a GPU the loss of another one is NaN.
        smoothing: ``0 <= smoothing < 1``; if it is not 0, ``V`` must be above 2.

    Returns:
        fp32 ``[rows]``.

    Raises:
        ValueError: shapes do not fit, or ``smoothing`` is out of range.
        RuntimeError: a label is out of range.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"label_smoothed_cross_entropy: hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"label_smoothed_cross_entropy: labels {tuple(labels.shape)} or bias {tuple(bias.shape)} do not fit "
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothed_cross_entropy: smoothing must be at least 0 and below 1, got {smoothing}")
    if smoothing > 0 and weight.shape[0] <= 2:
        raise ValueError(
            f"label_smoothed_cross_entropy: smoothing needs a vocabulary of more than 2, got {weight.shape[0]}"
        )
    chosen = select("label_smoothed_cross_entropy", hidden, weight, bias, refusals=_triton.refuse_dtype(hidden))
    if chosen == "reference":
        return reference.label_smoothed_cross_entropy(hidden, weight, bias, labels, smoothing)
    loss: torch.Tensor = (_triton_op if chosen == "triton" else _op)(hidden, weight, bias, labels, smoothing)[0]
    return loss

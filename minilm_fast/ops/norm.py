"""Residual + LayerNorm, bias + GELU, and the embeddings' gather + LayerNorm.

``LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, the variance biased;
statistics in fp32 whatever the input. ``GELU(x) = x * Phi(x)`` with the exact normal distribution function.

``dropout_add_layer_norm`` and ``bias_gelu`` have a backward pass. It computes the sums, the dropout and the activation
again from the inputs; of the forward pass only the mean and ``1 / sqrt(var + eps)`` of each row are kept.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from minilm_fast.ops import _cuda, _triton, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import LIBRARY, define, define_triton
from minilm_fast.ops.dropout import dropout_factors

Optional = torch.Tensor | None
_MOST_TRITON_CHANNELS = 8192


def _sum(
    x: torch.Tensor, residual: Optional, dropout: float, seed: Optional, x_bias: Optional
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """``dropout(x + x_bias) + residual`` in fp32 and the factors of the dropout."""
    factors = 1.0 if seed is None else dropout_factors(dropout, seed, x.shape[0], x.shape[1], device=x.device)[0]
    total = (x.float() if x_bias is None else x + x_bias) * factors
    return (total if residual is None else total + residual), factors


def _dropout_norm_reference(
    x: torch.Tensor,
    residual: Optional,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float,
    seed: Optional,
    x_bias: Optional,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total, _ = _sum(x, residual, dropout, seed, x_bias)
    out = reference.dropout_add_layer_norm(x, residual, weight, bias, eps, dropout, seed, x_bias)
    return out, total.mean(1), (total.var(1, correction=0) + eps).rsqrt()


def _dropout_norm_backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    residual: Optional,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout: float,
    seed: Optional,
    x_bias: Optional,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total, factors = _sum(x, residual, dropout, seed, x_bias)
    normal = (total - mean[:, None]) * rstd[:, None]
    grad = grad.float()
    upstream = grad * weight
    along = normal * (upstream * normal).mean(1, keepdim=True)
    total_grad = (upstream - upstream.mean(1, keepdim=True) - along) * rstd[:, None]
    x_grad = total_grad * factors
    return (
        x_grad.to(x.dtype),
        x.new_empty(0)
        if residual is None or not _gradients_differ(x, residual, dropout)
        else total_grad.to(residual.dtype),
        (grad * normal).sum(0),
        grad.sum(0),
        x.new_empty(0, dtype=torch.float32) if x_bias is None else x_grad.sum(0),
    )


def _gelu_backward_reference(grad: torch.Tensor, x: torch.Tensor, bias: Optional) -> tuple[torch.Tensor, torch.Tensor]:
    v = x.float() if bias is None else x + bias
    density = torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    x_grad = grad * (torch.erfc(v * -math.sqrt(0.5)) / 2 + v * density)
    return x_grad.to(x.dtype), x_grad.new_empty(0) if bias is None else x_grad.sum(0)


_norm_op = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference.add_layer_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
)
_GELU = ("bias_gelu(Tensor x, Tensor? bias) -> Tensor", lambda x, bias: x.new_empty(x.shape))
_GELU_BACKWARD = (
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    lambda grad, x, bias: (
        x.new_empty(x.shape),
        x.new_empty((0 if bias is None else x.shape[1],), dtype=torch.float32),
    ),
)
_DROPOUT_NORM = (
    "dropout_add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout, "
    "Tensor? seed, Tensor? x_bias) -> (Tensor, Tensor, Tensor)",
    lambda x, *_: (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty((x.shape[0],), dtype=torch.float32),
    ),
)
# Where the gradient of residual is the same as that of x, an empty one stands for it; so it does for a missing x_bias.
_DROPOUT_NORM_BACKWARD = (
    "dropout_add_layer_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd, "
    "float dropout, Tensor? seed, Tensor? x_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, residual, weight, mean, rstd, dropout, seed, x_bias: (
        x.new_empty(x.shape),
        residual.new_empty(x.shape) if _gradients_differ(x, residual, dropout) else x.new_empty(0),
        torch.empty_like(weight),
        torch.empty_like(weight),
        weight.new_empty((0 if x_bias is None else x.shape[1],)),
    ),
)
_gelu_op = define(_GELU[0], reference=reference.bias_gelu, fake=_GELU[1])
_gelu_backward_op = define(_GELU_BACKWARD[0], reference=_gelu_backward_reference, fake=_GELU_BACKWARD[1])
_dropout_norm_op = define(_DROPOUT_NORM[0], reference=_dropout_norm_reference, fake=_DROPOUT_NORM[1])
_dropout_norm_backward_op = define(
    _DROPOUT_NORM_BACKWARD[0], reference=_dropout_norm_backward_reference, fake=_DROPOUT_NORM_BACKWARD[1]
)
_triton_gelu_op, _triton_gelu_backward_op, _triton_dropout_norm_op, _triton_dropout_norm_backward_op = (
    define_triton(schema, kernels="norm", fake=fake)
    for schema, fake in (_GELU, _GELU_BACKWARD, _DROPOUT_NORM, _DROPOUT_NORM_BACKWARD)
)
_embed_op = define(
    "embed_layer_norm(Tensor ids, Tensor positions, Tensor? types, Tensor word, Tensor position, Tensor? type, "
    "Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference.embed_layer_norm,
    fake=lambda ids, positions, types, word, *_: word.new_empty((ids.shape[0], word.shape[1]), dtype=torch.float32),
)


def _refuse(x: torch.Tensor) -> dict[str, str | None]:
    if x.shape[-1] > _MOST_TRITON_CHANNELS:
        return {"triton": f"the {x.shape[-1]} channels are more than {_MOST_TRITON_CHANNELS}"}
    return _triton.refuse_dtype(x)


def _gradients_differ(x: torch.Tensor, residual: Optional, dropout: float) -> bool:
    return residual is not None and (dropout > 0 or residual.dtype != x.dtype)


def _setup_gelu(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(backward_op: Any, ctx: Any, grad: torch.Tensor) -> tuple[Optional, Optional]:
    x, bias = ctx.saved_tensors
    x_grad, bias_grad = backward_op(grad, x, bias)
    return x_grad, None if bias is None else bias_grad


def _setup_dropout_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, _, _, ctx.dropout, seed, x_bias = inputs
    ctx.save_for_backward(x, residual, weight, *output[1:], seed, x_bias)
    ctx.mark_non_differentiable(*output[1:])


def _dropout_norm_backward(backward_op: Any, ctx: Any, grad: torch.Tensor, *_: object) -> tuple[Optional, ...]:
    x, residual, weight, mean, rstd, seed, x_bias = ctx.saved_tensors
    x_grad, residual_grad, weight_grad, bias_grad, x_bias_grad = backward_op(
        grad, x, residual, weight, mean, rstd, ctx.dropout, seed, x_bias
    )
    if residual is None:
        residual_grad = None
    elif not _gradients_differ(x, residual, ctx.dropout):
        residual_grad = x_grad
    return x_grad, residual_grad, weight_grad, bias_grad, None, None, None, None if x_bias is None else x_bias_grad


for _name, _op in (("bias_gelu", _gelu_backward_op), ("triton_bias_gelu", _triton_gelu_backward_op)):
    torch.library.register_autograd(
        f"minilm_fast::{_name}", partial(_gelu_backward, _op), setup_context=_setup_gelu, lib=LIBRARY
    )
for _name, _op in (
    ("dropout_add_layer_norm", _dropout_norm_backward_op),
    ("triton_dropout_add_layer_norm", _triton_dropout_norm_backward_op),
):
    torch.library.register_autograd(
        f"minilm_fast::{_name}", partial(_dropout_norm_backward, _op), setup_context=_setup_dropout_norm, lib=LIBRARY
    )


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """``LayerNorm(x + residual)``.

    Args:
        x, residual: fp32 or bf16 ``[rows, channels]``, on a GPU fp16 too; ``residual`` may be None.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes do not fit.
    """
    chosen = select("add_layer_norm", x, residual, weight, bias)
    if chosen == "cuda":
        return _cuda.add_layer_norm(x, residual, weight, bias, eps)
    if chosen == "reference":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _norm_op(x, residual, weight, bias, eps)


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``LayerNorm(dropout(x + x_bias) + residual)``, differentiable.

    Args:
        x: fp32 or bf16 ``[rows, channels]``; on a GPU fp16 too, as for ``residual``, and at most 8192 channels.
        residual: fp32 or bf16 of the same shape, or None.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.
        dropout: chance of an element of ``x`` to be dropped, below 1 (see :mod:`minilm_fast.ops.dropout`).
        seed: int64 ``[1]`` on the CPU, needed with ``dropout``; the same seed drops the same elements.
        x_bias: fp32 ``[channels]`` or None: the bias of the linear layer before, which then needs no pass of its own.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        ValueError: ``dropout`` out of range or without ``seed``.
        RuntimeError: shapes do not fit.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout_add_layer_norm: dropout must be at least 0 and below 1, got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError("dropout_add_layer_norm: dropout needs a seed")
    drawn = seed if dropout > 0 else None
    chosen = select("dropout_add_layer_norm", x, residual, weight, bias, x_bias, refusals=_refuse(x))
    if chosen == "reference":
        return reference.dropout_add_layer_norm(x, residual, weight, bias, eps, dropout, drawn, x_bias)
    op = _triton_dropout_norm_op if chosen == "triton" else _dropout_norm_op
    out: torch.Tensor = op(x, residual, weight, bias, eps, dropout, drawn, x_bias)[0]
    return out


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``GELU(x + bias)``, exact (erf), differentiable.

    Args:
        x: fp32 or bf16 ``[rows, channels]``; on a GPU fp16 too.
        bias: fp32 ``[channels]`` or None.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes do not fit.
    """
    chosen = select("bias_gelu", x, bias, refusals=_triton.refuse_dtype(x))
    if chosen == "reference":
        return reference.bias_gelu(x, bias)
    return _triton_gelu_op(x, bias) if chosen == "triton" else _gelu_op(x, bias)


def embed_layer_norm(
    ids: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor | None,
    word: torch.Tensor,
    position: torch.Tensor,
    type: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``LayerNorm(word[ids] + position[positions] + type[types])``.

    Args:
        ids, positions, types: int32 ``[tokens]``; ``types`` may be None.
        word, position, type: embedding tables ``[rows, channels]``, fp32; ``type`` may be None.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.

    Returns:
        fp32 ``[tokens, channels]``.

    Raises:
        RuntimeError: shapes do not fit, or an id lies outside its table.
    """
    args = (ids, positions, types, word, position, type, weight, bias, eps)
    chosen = select("embed_layer_norm", word, weight, bias)
    if chosen in ("cuda", "reference"):
        return reference.embed_layer_norm(*args)
    return _embed_op(*args)

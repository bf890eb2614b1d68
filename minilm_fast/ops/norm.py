"""Residual + LayerNorm, bias + GELU, and the embeddings' gather + LayerNorm.

``LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension, the variance biased;
statistics in fp32 whatever the input. ``GELU(x) = x * Phi(x)`` with the exact normal distribution function.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define

_norm_op = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference.add_layer_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
)
_gelu_op = define(
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    reference=reference.bias_gelu,
    fake=lambda x, bias: x.new_empty(x.shape),
)
_embed_op = define(
    "embed_layer_norm(Tensor ids, Tensor positions, Tensor? types, Tensor word, Tensor position, Tensor? type, "
    "Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference.embed_layer_norm,
    fake=lambda ids, positions, types, word, *_: word.new_empty((ids.shape[0], word.shape[1]), dtype=torch.float32),
)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """``LayerNorm(x + residual)``.

    Args:
        x, residual: fp32 or bf16 ``[rows, channels]``; ``residual`` may be None.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes do not fit.
    """
    if select("add_layer_norm", x, residual, weight, bias) == "reference":
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
) -> torch.Tensor:
    """``LayerNorm(dropout(x) + residual)``, differentiable.

    Args:
        x: fp32 or bf16 ``[rows, channels]``.
        residual: fp32 or bf16 of the same shape, or None.
        weight, bias: fp32 ``[channels]``.
        eps: added to the variance.
        dropout: chance of an element of ``x`` to be dropped, below 1 (see :mod:`minilm_fast.ops.dropout`).
        seed: int64 ``[1]`` on the CPU, needed with ``dropout``; the same seed drops the same elements.

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
    return reference.dropout_add_layer_norm(x, residual, weight, bias, eps, dropout, seed)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``GELU(x + bias)``, exact (erf).

    Args:
        x: fp32 or bf16 ``[rows, channels]``.
        bias: fp32 ``[channels]`` or None.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes do not fit.
    """
    if select("bias_gelu", x, bias) == "reference":
        return reference.bias_gelu(x, bias)
    return _gelu_op(x, bias)


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
    if select("embed_layer_norm", word, weight, bias) == "reference":
        return reference.embed_layer_norm(*args)
    return _embed_op(*args)

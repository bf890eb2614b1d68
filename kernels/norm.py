"""Dropout + residual + LayerNorm and bias + GELU, forward and backward (minilm_fast/ops/norm.py).

All are bound by memory: each reads its operands once and writes its results once. Gradients of vectors are summed by a
fixed number of programs over a fixed set of rows each, and then over the programs, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from minilm_fast.kernels.common import (
    Dropout,
    check,
    check_dtype,
    check_rows,
    check_vector,
    dropout_keep,
    with_contiguous_rows,
)

Optional = torch.Tensor | None
_WARPS = 4
_TILE = 2048  # elements that a program holds
_GELU_COLUMNS = 256
_PARTS = 512  # programs that sum the gradients of vectors
MOST_CHANNELS = 8192
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0


@triton.jit(do_not_specialize=["rows"])
def _gelu_forward(x, bias, out, x_stride, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    place = row.to(tl.int64)[:, None]
    v = tl.load(x + place * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + column, mask=column < channels, other=0.0)[None, :]
    y = 0.5 * v * (1.0 + tl.erf(v * _SQRT_HALF))
    tl.store(out + place * channels + column[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gelu_backward(
    grad, x, bias, x_grad, parts, grad_stride, x_stride, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    shift = tl.zeros([COLUMNS], tl.float32)
    if bias is not None:
        shift += tl.load(bias + column, mask=inside, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None]
        v = tl.load(x + place * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        g = tl.load(grad + place * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dv = g * (0.5 * (1.0 + tl.erf(v * _SQRT_HALF)) + v * _DENSITY * tl.exp(-0.5 * v * v))
        tl.store(x_grad + place * channels + column[None, :], dv, mask=mask)
        total += dv
    if bias is not None:
        tl.store(parts + tl.program_id(0) * channels + column, tl.sum(total, 0), mask=inside)


@triton.jit
def _inputs(
    x,
    residual,
    x_bias,
    x_stride,
    residual_stride,
    row,
    column,
    mask,
    low,
    high,
    threshold,
    factor,
    DROPOUT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``dropout(x + x_bias) + residual`` of some rows, and which elements of ``x`` were kept."""
    place = row.to(tl.int64)[:, None]
    total = tl.load(x + place * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if x_bias is not None:
        total += tl.load(x_bias + column[None, :], mask=mask, other=0.0)
    keep = mask
    if DROPOUT:
        keep = dropout_keep(low, high, threshold, tl.zeros([1, 1], tl.int32), row, 0, COLUMNS)
        total = tl.where(keep, total * factor, 0.0)
    if residual is not None:
        total += tl.load(residual + place * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return total, keep


@triton.jit(do_not_specialize=["rows", "low", "high", "threshold"])
def _norm_forward(
    x,
    residual,
    weight,
    bias,
    x_bias,
    out,
    mean,
    rstd,
    x_stride,
    residual_stride,
    rows,
    channels,
    eps,
    low,
    high,
    threshold,
    factor,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    total, _ = _inputs(
        x,
        residual,
        x_bias,
        x_stride,
        residual_stride,
        row,
        column,
        mask,
        low,
        high,
        threshold,
        factor,
        DROPOUT,
        COLUMNS,
    )
    center = tl.sum(tl.where(mask, total, 0.0), 1) / channels
    deviation = tl.where(mask, total - center[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation, 1) / channels + eps)
    w = tl.load(weight + column, mask=column < channels, other=0.0)
    b = tl.load(bias + column, mask=column < channels, other=0.0)
    y = deviation * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * channels + column[None, :], y, mask=mask)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "low", "high", "threshold"])
def _norm_backward(
    grad,
    x,
    residual,
    weight,
    x_bias,
    mean,
    rstd,
    x_grad,
    residual_grad,
    parts,
    grad_stride,
    x_stride,
    residual_stride,
    rows,
    channels,
    low,
    high,
    threshold,
    factor,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < channels, other=0.0)
    weight_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_bias_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < channels)[None, :]
        place = row.to(tl.int64)[:, None] * channels + column[None, :]
        total, keep = _inputs(
            x,
            residual,
            x_bias,
            x_stride,
            residual_stride,
            row,
            column,
            mask,
            low,
            high,
            threshold,
            factor,
            DROPOUT,
            COLUMNS,
        )
        center = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.where(mask, (total - center[:, None]) * scale[:, None], 0.0)
        g = tl.load(grad + row.to(tl.int64)[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        upstream = g * w[None, :]
        along = tl.sum(upstream * normal, 1) / channels
        level = tl.sum(upstream, 1) / channels
        total_grad = (upstream - level[:, None] - normal * along[:, None]) * scale[:, None]
        if residual_grad is not None:
            tl.store(residual_grad + place, total_grad, mask=mask)
        if DROPOUT:
            total_grad = tl.where(keep, total_grad * factor, 0.0)
        tl.store(x_grad + place, total_grad, mask=mask)
        weight_total += g * normal
        bias_total += g
        if x_bias is not None:
            x_bias_total += tl.where(mask, total_grad, 0.0)
    to = parts + tl.program_id(0) * 3 * channels + column
    tl.store(to, tl.sum(weight_total, 0), mask=column < channels)
    tl.store(to + channels, tl.sum(bias_total, 0), mask=column < channels)
    if x_bias is not None:
        tl.store(to + 2 * channels, tl.sum(x_bias_total, 0), mask=column < channels)


def bias_gelu(x: torch.Tensor, bias: Optional) -> torch.Tensor:
    """Host function of the operator: ``x [rows, channels]`` -> a contiguous tensor of its shape and dtype."""
    check(x.dim() == 2, f"bias_gelu: x must be a matrix, got the shape {list(x.shape)}")
    check_rows("bias_gelu", "x", x, x.shape, x.device)
    rows, channels = x.shape
    check_vector("bias_gelu", "bias", bias, (channels,), x.device)
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if out.numel():
        tile = _TILE // _GELU_COLUMNS
        grid = (triton.cdiv(rows, tile), triton.cdiv(channels, _GELU_COLUMNS))
        _gelu_forward[grid](x, bias, out, x.stride(0), rows, channels, tile, _GELU_COLUMNS, num_warps=_WARPS)
    return out


def bias_gelu_backward(grad: torch.Tensor, x: torch.Tensor, bias: Optional) -> tuple[torch.Tensor, torch.Tensor]:
    """Host function: the gradients of ``x`` and of ``bias`` (fp32; empty without it)."""
    check_rows("bias_gelu_backward", "x", x, x.shape, x.device)
    grad = with_contiguous_rows(grad)
    check_rows("bias_gelu_backward", "grad", grad, x.shape, x.device)
    rows, channels = x.shape
    check_vector("bias_gelu_backward", "bias", bias, (channels,), x.device)
    x_grad = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    tile = _TILE // _GELU_COLUMNS
    programs = min(triton.cdiv(rows, tile), _PARTS)
    parts = torch.empty((programs, 0 if bias is None else channels), dtype=torch.float32, device=x.device)
    if x_grad.numel():
        grid = (programs, triton.cdiv(channels, _GELU_COLUMNS))
        _gelu_backward[grid](
            grad,
            x,
            bias,
            x_grad,
            parts,
            grad.stride(0),
            x.stride(0),
            rows,
            channels,
            tile,
            _GELU_COLUMNS,
            num_warps=_WARPS,
        )
    return x_grad, parts.sum(0)


def _tile(channels: int) -> tuple[int, int, int]:
    """Rows and columns that a program holds, and its warps."""
    columns = max(128, triton.next_power_of_2(channels))
    return max(1, _TILE // columns), columns, max(_WARPS, columns // 512)


def _check_norm(op: str, x: torch.Tensor, residual: Optional, **vectors: Optional) -> None:
    check(x.dim() == 2, f"{op}: x must be a matrix, got the shape {list(x.shape)}")
    check_rows(op, "x", x, x.shape, x.device)
    check(1 <= x.shape[1] <= MOST_CHANNELS, f"{op}: x must have 1 to {MOST_CHANNELS} channels, got {x.shape[1]}")
    if residual is not None:
        check_rows(op, "residual", residual, x.shape, x.device)
    for name, vector in vectors.items():
        check_vector(op, name, vector, (x.shape[0] if name in ("mean", "rstd") else x.shape[1],), x.device)


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: Optional,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float,
    seed: Optional,
    x_bias: Optional,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Host function of the operator: the result, and the mean and ``1 / sqrt(var + eps)`` of each row."""
    op = "dropout_add_layer_norm"
    _check_norm(op, x, residual, weight=weight, bias=bias, x_bias=x_bias)
    drop = Dropout(op, dropout, seed)
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tile, columns, warps = _tile(channels)
    if rows:
        _norm_forward[(triton.cdiv(rows, tile),)](
            x,
            residual,
            weight,
            bias,
            x_bias,
            out,
            mean,
            rstd,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            rows,
            channels,
            eps,
            drop.low,
            drop.high,
            drop.threshold,
            drop.factor,
            drop.threshold > 0,
            tile,
            columns,
            num_warps=warps,
        )
    return out, mean, rstd


def dropout_add_layer_norm_backward(
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
    """Host function: the gradients of x, residual (empty where it is that of x), weight, bias and x_bias."""
    op = "dropout_add_layer_norm_backward"
    _check_norm(op, x, residual, weight=weight, x_bias=x_bias, mean=mean, rstd=rstd)
    grad = with_contiguous_rows(grad)
    check_dtype(op, "grad", grad)
    check_rows(op, "grad", grad, x.shape, x.device)
    drop = Dropout(op, dropout, seed)
    rows, channels = x.shape
    x_grad = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    residual_grad = None
    if residual is not None and (dropout > 0 or residual.dtype != x.dtype):
        residual_grad = torch.empty((rows, channels), dtype=residual.dtype, device=x.device)
    tile, columns, warps = _tile(channels)
    programs = min(triton.cdiv(rows, tile), _PARTS)
    parts = torch.empty((programs, 3, channels), dtype=torch.float32, device=x.device)
    if rows:
        _norm_backward[(programs,)](
            grad,
            x,
            residual,
            weight,
            x_bias,
            mean,
            rstd,
            x_grad,
            residual_grad,
            parts,
            grad.stride(0),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            rows,
            channels,
            drop.low,
            drop.high,
            drop.threshold,
            drop.factor,
            drop.threshold > 0,
            tile,
            columns,
            num_warps=warps,
        )
    vectors = parts.sum(0)
    return (
        x_grad,
        x.new_empty(0) if residual_grad is None else residual_grad,
        vectors[0].clone(),
        vectors[1].clone(),
        vectors[2].clone() if x_bias is not None else x.new_empty(0, dtype=torch.float32),
    )

"""Self-attention over a padded batch: its tokens are packed, go through :func:`ops.attention`, and are spread again.

One operator with results of fixed shape, so that ``torch.compile`` sees no sizes that depend on the mask. What is at
padding is never read as a key, and its rows are 0 in the result and in the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import LIBRARY
from minilm_fast.ops.attention import (
    _backward_op,
    _reference_backward,
    _refusals,
    _triton_backward_op,
    attention,
    filled_heads,
)
from minilm_fast.ops.layout import SequenceLayout

_OPTIONS = "Tensor? mask, bool causal, float scale, float dropout, Tensor? seed"
LIBRARY.define(f"padded_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"padded_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) "
    f"-> (Tensor, Tensor, Tensor)"
)


class _Packing:
    """Where the tokens of a padded batch ``[batch, length]`` are, and their layout."""

    def __init__(self, batch: int, length: int, mask: Tensor | None, causal: bool, device: torch.device) -> None:
        self.size = (batch, length)
        counts = [length] * batch if mask is None else mask.sum(1).tolist()
        full = sum(counts) == batch * length
        self.place = None if mask is None or full else mask.flatten().nonzero().flatten()
        build = SequenceLayout.causal if causal else SequenceLayout.bidirectional
        self.layout = build(counts, device)

    def rows(self, x: Tensor) -> Tensor:
        """``[batch, length, heads, head_dim]`` -> ``[tokens, heads, head_dim]``, in fp32 for fp16 on a CPU."""
        rows = x.flatten(0, 1)
        if self.place is not None:
            rows = rows.index_select(0, self.place)
        elif rows.stride(-1) != 1:
            rows = rows.contiguous()
        return rows.float() if rows.dtype == torch.float16 and rows.device.type == "cpu" else rows

    def spread(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`rows`."""
        rows = rows.to(dtype)
        if self.place is not None:
            batch, length = self.size
            rows = rows.new_zeros(batch * length, *rows.shape[1:]).index_copy_(0, self.place, rows)
        return rows.unflatten(0, self.size)


_REMEMBERED = "_minilm_fast_packings"


def remember_packing(mask: Tensor) -> None:
    """Lets the calls that get this very mask find its tokens once.

    Args:
        mask: bool ``[batch, length]``. Its values must not change any more.
    """
    setattr(mask, _REMEMBERED, {})


def _packing(q: Tensor, mask: Tensor | None, causal: bool) -> _Packing:
    known: dict[bool, _Packing] | None = getattr(mask, _REMEMBERED, None)
    if known is None:
        return _Packing(q.shape[0], q.shape[1], mask, causal, q.device)
    if causal not in known:
        known[causal] = _Packing(q.shape[0], q.shape[1], mask, causal, q.device)
    return known[causal]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    packing = _packing(q, mask, causal)
    q_rows, k_rows, v_rows = (packing.rows(x) for x in (q, k, v))
    out, lse = attention(q_rows, k_rows, v_rows, packing.layout, scale=scale, dropout=dropout, seed=seed)
    kept = lse.new_zeros(lse.shape[0], q.shape[0] * q.shape[1])
    kept[:, : lse.shape[1]] = lse
    return packing.spread(out, q.dtype), kept


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = _packing(q, mask, causal)
    rows = [packing.rows(x) for x in (grad_out, q, k, v, out)]
    backend = select("attention", *rows[1:4], refusals=_refusals(rows[1], None))
    grad_rows, *rows, out_rows = (filled_heads(x, backend) for x in rows)
    run = {"reference": _reference_backward, "triton": _triton_backward_op}.get(backend, _backward_op)
    layout = packing.layout
    sequences = (layout.cu_seqlens, layout.segments, None, layout.max_seqlen)
    kept = lse[:, : layout.total].contiguous()
    *gradients, _ = run(grad_rows, *rows, out_rows, kept, *sequences, scale, None, None, dropout, seed, False)
    dq, dk, dv = (packing.spread(x[..., : q.shape[-1]], q.dtype) for x in gradients)
    return dq, dk, dv


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, length, heads, _size = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, batch * length), dtype=torch.float32)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, causal, scale, dropout, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.numbers = (causal, scale, dropout)
    ctx.save_for_backward(q, k, v, *output, mask, seed)


def _gradients(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    found = torch.ops.minilm_fast.padded_attention_backward(grad_out, q, k, v, out, lse, mask, *ctx.numbers, seed)
    return (*found, None, None, None, None, None)


for _name, _kernel, _shapes in (
    ("padded_attention", _forward, _fake),
    ("padded_attention_backward", _backward, _fake_backward),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minilm_fast::{_name}", _shapes, lib=LIBRARY)
torch.library.register_autograd("minilm_fast::padded_attention", _gradients, setup_context=_save, lib=LIBRARY)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Self-attention over a padded batch; no matrix of the square of the length exists.

    Args:
        q, k, v: ``[batch, length, heads, head_dim]`` of one dtype: fp32, bf16 or fp16 (which a CPU computes in fp32);
            may be strided.
        mask: bool ``[batch, length]``, False at padding, which may be anywhere; None: no padding.
        causal: whether a token sees itself and those before it only.
        scale: factor of the scores, ``head_dim ** -0.5`` if None.
        dropout: chance of a probability to be dropped, below 1.
        seed: int64 ``[1]`` on the CPU, needed with ``dropout``.

    Returns:
        The shape and dtype of ``q``, 0 at padding.

    Raises:
        ValueError: shapes do not fit, or ``dropout`` comes without ``seed``.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"padded_attention: q, k and v must be one shape [batch, length, heads, head_dim], got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if mask is not None and (mask.shape != q.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"padded_attention: mask must be bool {tuple(q.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if not 0 <= dropout < 1 or (dropout > 0 and seed is None):
        raise ValueError("padded_attention: dropout must be at least 0 and below 1, and needs a seed above 0")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.minilm_fast.padded_attention(q, k, v, mask, causal, scale, dropout, seed)[0]
    return out

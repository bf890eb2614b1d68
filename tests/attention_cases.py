"""Batches for the CUDA kernel of attention, and what it is held to; on a GPU and emulated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_checks import EPSILON, assert_accurate

from minilm_fast.ops import SequenceLayout, reference

DTYPES = (torch.float16, torch.bfloat16)
COUNTS = {
    "bidirectional": ([150, 1, 0, 64, 65], [0] * 5, [0] * 5),
    "causal": ([0] * 4, [140, 0, 1, 67], [0] * 4),
    "seq2seq": ([100, 0, 70], [40, 7, 1], [0] * 3),
    "pseudo-masked": ([97, 0, 2], [33, 9, 1], [33, 9, 1]),
    "only pseudo": ([0], [0], [70]),
    "more pseudo than target, fewer": ([3, 64], [2, 20], [80, 3]),
}
"""Source, target and pseudo tokens of each sequence; enough for tiles that are full, partly masked and empty."""


@dataclass
class Batch:
    """Operands of one call, strided views of a wider tensor whose other numbers are NaN."""

    layout: SequenceLayout
    operands: list[torch.Tensor]
    scale: float
    relative_bias: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Any, ...]:
        """Those of ``torch.ops.minilm_fast.attention``."""
        layout = self.layout
        sequences = (layout.cu_seqlens, layout.segments, layout.cu_queries, layout.max_seqlen)
        return *self.operands, *sequences, self.scale, self.relative_bias, self.position_ids, 0.0, None

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._specified(torch.float64)

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Holds the errors against fp64: to twice those of rounding probabilities and results to the type."""
        exact, exact_lse = self.exact()
        assert out.dtype == self.operands[0].dtype and lse.dtype == torch.float32
        assert_accurate(out.cpu(), self._rounded(exact_lse), exact)
        # Rounding the exponents to fp32, the special-function unit, and the polynomial.
        allowance = 8 * EPSILON * (1 + exact_lse.abs().max().item() if exact_lse.numel() else 1.0)
        assert_accurate(lse.cpu(), exact_lse.float(), exact_lse, allowance)

    def _specified(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.cpu().to(dtype) for x in self.operands)
        bias, positions = self.relative_bias, self.position_ids
        return reference.attention(
            *(q, k, v, self.layout.to("cpu")),
            scale=self.scale,
            relative_bias=None if bias is None else bias.cpu(),
            position_ids=None if positions is None else positions.cpu(),
        )

    def _rounded(self, lse: torch.Tensor) -> torch.Tensor:
        """The result from probabilities of the operands' type, by the specification's own mask and bias."""
        dtype = self.operands[0].dtype
        tokens, heads, size = self.operands[1].shape
        total = torch.zeros(self.operands[0].shape, dtype=torch.float64)
        for start in range(0, tokens, size):
            # Probabilities come out where the values are rows of a unit matrix.
            v = torch.zeros(tokens, heads, size)
            width = min(size, tokens - start)
            v[start : start + width] = torch.eye(width, size)[:, None]
            q, k, _ = (x.cpu().double() for x in self.operands)
            bias, positions = self.relative_bias, self.position_ids
            p, _ = reference.attention(
                *(q, k, v.double(), self.layout.to("cpu")),
                scale=self.scale,
                relative_bias=None if bias is None else bias.cpu(),
                position_ids=None if positions is None else positions.cpu(),
            )
            values = self.operands[2][start : start + width].cpu().double()
            total += torch.einsum("qhk,khd->qhd", p.to(dtype).double()[..., :width], values)
        return total.to(dtype)


def batch(
    layout: SequenceLayout,
    size: int,
    dtype: torch.dtype,
    *,
    bias: int | None = None,
    scale: float | None = None,
    heads: int = 2,
    device: str = "cpu",
) -> Batch:
    """Random operands; with ``bias`` the distances are clamped to it and positions are in no order."""
    generator = torch.Generator().manual_seed(1000 * layout.total + size)

    def rows(count: int, parts: int) -> list[torch.Tensor]:
        wide = torch.full((count, parts, heads, size + 8), float("nan"))
        wide[..., :size] = torch.randn(count, parts, heads, size, generator=generator)
        return list(wide.to(dtype).to(device)[..., :size].unbind(1))

    operands = rows(layout.total, 3)
    if layout.cu_queries is not None:
        operands[:1] = rows(layout.total_queries, 1)
    found = Batch(layout.to(device), operands, size**-0.5 if scale is None else scale)
    if bias is not None:
        found.relative_bias = torch.randn(heads, 2 * bias + 1, generator=generator).to(device)
        positions = torch.randint(-5, 2 * bias, (layout.total,), dtype=torch.int32, generator=generator)
        found.position_ids = positions.to(device)
    return found

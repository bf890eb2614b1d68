"""Batches for the CUDA kernel of attention, and what it is held to; on a GPU and emulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from kernel_checks import EPSILON, assert_accurate

from minilm_fast.ops import SequenceLayout, reference

DTYPES = (torch.float16, torch.bfloat16)
SEED = torch.tensor([2**60 + 2**31 + 11])
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
    dropout: float = 0.0

    def arguments(self) -> tuple[Any, ...]:
        """Those of ``torch.ops.minilm_fast.attention``."""
        layout = self.layout
        sequences = (layout.cu_seqlens, layout.segments, layout.cu_queries, layout.max_seqlen)
        return *self.operands, *sequences, self.scale, self.relative_bias, self.position_ids, self.dropout, SEED

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._specified(*(x.cpu().double() for x in self.operands))

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Holds the errors against fp64: to twice those of rounding probabilities and results to the type."""
        exact, exact_lse = self.exact()
        assert out.dtype == self.operands[0].dtype and lse.dtype == torch.float32
        assert_accurate(out.cpu(), self._rounded(), exact)
        # Rounding the exponents to fp32, the special-function unit, and the polynomial.
        allowance = 8 * EPSILON * (1 + exact_lse.abs().max().item() if exact_lse.numel() else 1.0)
        assert_accurate(lse.cpu(), exact_lse.float(), exact_lse, allowance)

    def gradient(self) -> torch.Tensor:
        """A random one of the result."""
        shape, dtype = self.operands[0].shape, self.operands[0].dtype
        generator = torch.Generator().manual_seed(shape.numel())
        return torch.randn(shape, generator=generator).to(dtype).to(self.operands[0].device)

    def check_gradients(self, grad_out: torch.Tensor, *found: torch.Tensor, worst: float = 2.0) -> None:
        """Holds the errors against fp64: to twice those of rounding the operands of products and the results.

        ``found`` may have the gradient of the bias at its end. ``worst`` is that of :func:`assert_accurate`.
        """
        leaves = [x.cpu().double().requires_grad_() for x in self.operands]
        if self.relative_bias is not None:
            leaves.append(self.relative_bias.cpu().double().requires_grad_())
        out, lse = self._specified(*leaves)
        grad = grad_out.cpu().double()
        # The specification does not tie what it returns for no rows to its operands.
        exact = torch.autograd.grad(out + 0 * leaves[0], leaves, grad, allow_unused=True)
        allowance = 8 * EPSILON * (1 + lse.abs().max().item() if lse.numel() else 1.0)
        cases = zip(found, self._rounded_gradients(grad), exact, leaves, strict=False)
        for ours, rounded, right, leaf in cases:
            right = torch.zeros_like(leaf) if right is None else right
            size = right.abs().max().item() if right.numel() else 0.0
            assert_accurate(ours.cpu(), rounded, right, allowance * size, worst)

    def _specified(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None = None,
        dropped: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias, positions = self.relative_bias if bias is None else bias, self.position_ids
        return reference.attention(
            *(q, k, v, self.layout.to("cpu")),
            scale=self.scale,
            relative_bias=None if bias is None else bias.cpu(),
            position_ids=None if positions is None else positions.cpu(),
            dropout=self.dropout if dropped else 0.0,
            seed=SEED,
        )

    def _probabilities(self, dropped: bool = True) -> torch.Tensor:
        """``[queries, heads, tokens]``, 0 in other sequences, by the specification's own mask, bias and dropout."""
        q, k, _ = (x.cpu().double() for x in self.operands)
        tokens, size = k.shape[0], k.shape[2]
        parts = [torch.zeros(*q.shape[:2], 0, dtype=torch.float64)]
        for start in range(0, tokens, size):
            # Probabilities come out where the values are rows of a unit matrix.
            width = min(size, tokens - start)
            v = torch.zeros_like(k)
            v[start : start + width] = torch.eye(width, size)[:, None]
            parts.append(self._specified(q, k, v, dropped=dropped)[0][..., :width])
        return torch.cat(parts, -1)

    def _rounded(self) -> torch.Tensor:
        """The result from probabilities of the operands' type."""
        dtype = self.operands[0].dtype
        values = self.operands[2].cpu().double()
        return torch.einsum("qhk,khd->qhd", self._probabilities().to(dtype).double(), values).to(dtype)

    def _rounded_gradients(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """From probabilities, gradients of scores, and a result of the operands' type."""
        dtype = self.operands[0].dtype
        q, k, v = (x.cpu().double() for x in self.operands)
        p = self._probabilities()
        level = (grad * self._rounded().double()).sum(-1, keepdim=True)
        ds = p * torch.einsum("qhd,khd->qhk", grad, v) - self._probabilities(False) * level
        ds = ds.to(dtype).double()
        dq = torch.einsum("qhk,khd->qhd", ds, k) * self.scale
        dk = torch.einsum("qhk,qhd->khd", ds, q) * self.scale
        found = [x.to(dtype) for x in (dq, dk, torch.einsum("qhk,qhd->khd", p.to(dtype).double(), grad))]
        if self.relative_bias is None or self.position_ids is None:
            return found
        heads, columns = self.relative_bias.shape
        positions, rows = self.position_ids.cpu().long(), self.layout.to("cpu").query_index()
        limit = columns // 2
        index = (positions - positions[rows][:, None]).clamp(-limit, limit) + limit
        bias = torch.zeros(heads, columns, dtype=torch.float64)
        for head in range(heads):
            bias[head].put_(index, ds[:, head], accumulate=True)
        return [*found, bias.float()]


def batch(
    layout: SequenceLayout,
    size: int,
    dtype: torch.dtype,
    *,
    bias: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
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
    found = Batch(layout.to(device), operands, size**-0.5 if scale is None else scale, dropout=dropout)
    if bias is not None:
        found.relative_bias = torch.randn(heads, 2 * bias + 1, generator=generator).to(device)
        positions = torch.randint(-5, 2 * bias, (layout.total,), dtype=torch.int32, generator=generator)
        found.position_ids = positions.to(device)
    return found


def _batches() -> Iterator[tuple[str, Callable[[], Batch]]]:
    for (mask, counts), dtype in product(COUNTS.items(), DTYPES):
        layout = SequenceLayout.from_counts(*counts)
        yield f"{mask} {dtype}", partial(batch, layout, 32, dtype)
    layout = SequenceLayout.from_counts([70, 1], [21, 0], [21, 0])
    for size, bias, dtype in product((32, 64, 128), (None, 9), DTYPES):
        yield f"head size {size}, bias {bias}, {dtype}", partial(batch, layout, size, dtype, bias=bias, heads=1)
    layout = SequenceLayout.from_counts([134, 0, 2], [13, 1, 0], [13, 7, 0])
    for counts, bias in product(([0, 0, 0], [160, 7, 0], [40, 8, 2]), (None, 200)):
        few = layout.with_queries(counts)
        yield f"{counts} rows ask, bias {bias}", partial(batch, few, 32, torch.bfloat16, bias=bias)
    # Longer than the 128 columns of one draw.
    layout = SequenceLayout.from_counts([240, 1], [40, 0], [40, 0])
    for size, bias in product((32, 64, 128), (None, 9)):
        name, few = f"dropout, head size {size}, bias {bias}", layout.with_queries([70, 1])
        yield name, partial(batch, layout, size, torch.float16, bias=bias, heads=1, dropout=0.3)
        yield f"{name}, few rows", partial(batch, few, size, torch.bfloat16, bias=bias, heads=2, dropout=0.1)


BATCHES = dict(_batches())
"""What forward and backward pass are both tried on."""

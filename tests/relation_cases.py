"""Relations for the CUDA kernels of the distillation loss, and what they are held to; on a GPU and emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_checks import EPSILON, assert_accurate

from minilm_fast.ops import SequenceLayout, reference

DTYPES = (torch.float16, torch.bfloat16)
KINDS = ("distinct", "symmetric", "symmetric student")
COUNTS = {
    "bidirectional": ([150, 1, 0, 64, 33], [0] * 5, [0] * 5),
    "causal": ([0] * 4, [140, 0, 1, 67], [0] * 4),
    "seq2seq": ([70, 0, 17], [80, 7, 1], [0] * 3),
    "pseudo-masked": ([97, 0, 2], [33, 9, 1], [33, 9, 1]),
    "only pseudo": ([0], [0], [70]),
    "more pseudo than target, fewer": ([3, 64], [2, 20], [80, 3]),
}
"""Source, target and pseudo tokens of each sequence; enough for tiles that are full, partly masked and empty."""
UPSTREAM = 1.7
# Forward: from the operator's arguments to the loss and both log-sum-exps; backward: from these arguments, with the
# gradient of the loss before them and the log-sum-exps amid them, to the gradients of a and b.
Operator = Callable[..., Any]


@dataclass
class Relation:
    """Operands of one call; strided views of wider tensors whose other numbers are NaN."""

    layout: SequenceLayout
    operands: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def _options(self) -> dict[str, Any]:
        sizes = {
            f"{side}_scale": x.shape[2] ** -0.5
            for side, x in zip(("teacher", "student"), self.operands[1:3], strict=True)
        }
        return sizes | {"reduction": "batch_mean"} | self.options

    def arguments(self) -> list[Any]:
        """Those of ``torch.ops.minilm_fast.relation_kl``; a b that is its side's a is None."""
        return self.with_student(*self.operands[2:])

    def with_student(self, sa: torch.Tensor, sb: torch.Tensor) -> list[Any]:
        """The arguments, with other tensors of the student."""
        ta, tb = self.operands[:2]
        layout = self.layout
        sides = (ta, None if tb is ta else tb, sa, None if sb is sa else sb)
        return [*sides, layout.cu_seqlens, layout.segments, layout.max_seqlen, *self._options().values()]

    def run(self, forward: Operator, backward: Operator) -> tuple[torch.Tensor, ...]:
        """Loss, log-sum-exps, and the gradients of the student's tensors, each once."""
        arguments = self.arguments()
        loss, *lse = forward(*arguments)
        grad = torch.tensor(UPSTREAM, device=loss.device)
        of_a, of_b = backward(grad, *arguments[:4], *lse, *arguments[4:])
        if arguments[3] is not None:
            return loss, *lse, of_a, of_b
        assert of_b.numel() == 0
        return loss, *lse, of_a

    def specified(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """The same from the reference, on a CPU, in ``dtype`` (None: with the rounding of the operands' type)."""
        found = {id(x): x.cpu() if dtype is None else x.cpu().to(dtype) for x in self.operands}
        ta, tb, sa, sb = (found[id(x)] for x in self.operands)
        a = sa.detach().requires_grad_()
        b = a if sb is sa else sb.detach().requires_grad_()
        loss, *lse = reference.relation_kl(ta, tb, a, b, self.layout.to("cpu"), **self._options())
        upstream = torch.tensor(UPSTREAM, dtype=loss.dtype)
        return loss.detach(), *lse, *torch.autograd.grad(loss, [a] if b is a else [a, b], upstream)

    def check(self, results: tuple[torch.Tensor, ...]) -> None:
        """Holds the errors against fp64 to twice those of eager PyTorch in fp32.

        To that come a rounding to fp32 of loss and log-sum-exps, and for the gradients, that differences of
        probabilities are rounded to the operands' type, and that probabilities which cancel are rounded to fp32.
        """
        assert all(x.dtype == torch.float64 for x in results[1:3])
        eager, exact = self.specified(), self.specified(torch.float64)
        for place, (mine, theirs, right) in enumerate(zip(results, eager, exact, strict=True)):
            largest = right.abs().max().item() if right.numel() else 0.0
            allowance = 2e-7 * max(1.0, largest)
            if place >= 3:
                allowance = largest * torch.finfo(mine.dtype).eps + self._cancelled(exact[1:3])
            assert_accurate(mine.cpu(), theirs, right, allowance)

    def _cancelled(self, lse: tuple[torch.Tensor, ...]) -> float:
        """What rounding an exponent makes in a gradient; rows of the shortest sequence count most."""
        options, student = self._options(), self.operands[2].float()
        lengths = [length for length in self.layout.segments.sum(1).tolist() if length > 0]
        weights = {
            "sum": 1.0,
            "token_mean": 1 / (student.shape[1] * max(1, self.layout.total)),
            "batch_mean": 1 / (student.shape[1] * min(lengths, default=1) * max(1, len(lengths))),
        }
        largest = student.abs().max().item() if student.numel() else 0.0
        exponent = 1.0 + max((x.abs().max().item() for x in lse if x.numel()), default=0.0)
        return EPSILON * exponent * UPSTREAM * weights[options["reduction"]] * abs(options["student_scale"]) * largest


def relation(
    layout: SequenceLayout,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    *,
    heads: int = 2,
    factor: float = 1.0,
    device: str = "cpu",
    **options: Any,
) -> Relation:
    """Random operands of the teacher's and the student's head size; ``factor`` multiplies them."""
    generator = torch.Generator().manual_seed(1000 * layout.total + sum(sizes))

    def side(size: int) -> list[torch.Tensor]:
        wide = torch.full((layout.total, 2, heads, size + 8), float("nan"))
        wide[..., :size] = torch.randn(layout.total, 2, heads, size, generator=generator) * factor
        return list(wide.to(dtype).to(device)[..., :size].unbind(1))

    (ta, tb), (sa, sb) = side(sizes[0]), side(sizes[1])
    operands = {
        "distinct": [ta, tb, sa, sb],
        "symmetric": [ta, ta, sa, sa],
        "symmetric student": [ta, tb, sa, sa],
        "symmetric teacher": [ta, ta, sa, sb],
    }
    return Relation(layout.to(device), operands[kind], options)

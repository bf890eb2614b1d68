"""Random arguments of a decoding step's attention, in which whatever must not be read is NaN or out of range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]
NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    """A decoding step. Examples use slots out of order and do not fill the caches."""

    lengths: tuple[int, ...] = (0, 17, 40, 1)
    steps: tuple[int, ...] = (0, 3, 24, 11)
    beams: int = 5
    rows: int = 2
    heads: int = 2
    size: int = 32
    source: int = 48
    history: int = 25
    bias: int | None = None


def arguments(
    shape: Shape, dtype: torch.dtype = torch.float32, cache: torch.dtype = torch.float32, seed: int = 0
) -> Arguments:
    """Random arguments; what must not be read is NaN or an index that does not exist."""
    torch.manual_seed(seed)
    examples, slots = len(shape.lengths), len(shape.lengths) + 2
    order = torch.randperm(slots)[:examples].int()
    source_k = torch.full((slots, shape.heads, shape.size, shape.source), NAN)
    source_v = torch.full((slots, shape.heads, shape.source, shape.size), NAN)
    history_k = torch.full((slots, shape.history, shape.beams, shape.heads, shape.size), NAN)
    history_v = history_k.clone()
    source_lengths = torch.full((slots,), 10**9, dtype=torch.int32)
    ancestry = torch.full((examples, shape.beams, shape.history), -7, dtype=torch.int32)
    for e, (slot, length, step) in enumerate(zip(order.tolist(), shape.lengths, shape.steps, strict=True)):
        source_lengths[slot] = length
        source_k[slot, :, :, :length].normal_()
        source_v[slot, :, :length].normal_()
        history_k[slot, :step].normal_()
        history_v[slot, :step].normal_()
        ancestry[e, :, :step] = torch.randint(0, shape.beams, (shape.beams, step))
    q, k, v = torch.randn(examples * shape.beams * shape.rows, 3, shape.heads, shape.size).to(dtype).unbind(1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "source_k": source_k.to(cache),
        "source_v": source_v.to(cache),
        "source_lengths": source_lengths,
        "history_k": history_k.to(cache),
        "history_v": history_v.to(cache),
        "ancestry": ancestry,
        "slots": order,
        "steps": torch.tensor(shape.steps, dtype=torch.int32),
        "rows": shape.rows,
        "scale": shape.size**-0.5,
        "relative_bias": None if shape.bias is None else torch.randn(shape.heads, 2 * shape.bias + 1),
    }


def copy(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    def convert(x: object) -> object:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.to(dtype or x.dtype, copy=True)

    return {name: convert(x) for name, x in arguments.items()}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)

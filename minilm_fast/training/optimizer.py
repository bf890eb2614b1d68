"""AdamW and the learning-rate schedule as the original trains with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from minilm_fast import ops


class AdamW(torch.optim.Optimizer):
    """AdamW with bias correction in the step size.

    It differs from ``torch.optim.AdamW`` in two places: ``eps`` is added to the square root of the second moment
    before that is corrected for its bias, and weights decay after the update (Loshchilov and Hutter, arXiv:1711.05101,
    algorithm 2, as transformers 2.x implemented it).

    Args:
        params: parameters or groups with their own ``weight_decay``.
        lr: learning rate; a schedule changes the groups' ``lr``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        group["step"] = step = group.get("step", 0) + 1
        for param in params:
            if not self.state[param]:
                self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        beta1, beta2 = group["betas"]
        ops.adamw_of_many(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            step_size=group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay=1 - group["lr"] * group["weight_decay"],
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for :class:`AdamW`: names with ``bias`` or ``LayerNorm.weight`` in them do not decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if "bias" in name or "LayerNorm.weight" in name else decayed).append(param)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def linear_schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the learning rate of step ``step`` (from 0): linear from 0 up, then linear down to 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

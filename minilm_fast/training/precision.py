"""Number formats of the forward pass, and the scaling of the loss that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from minilm_fast.errors import UserError
from minilm_fast.ops import forced_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Automatic mixed precision.

    Args:
        name: ``"fp32"``, ``"bf16"`` (autocast) or ``"fp16"`` (autocast, and a loss scaled so that small gradients
            do not vanish; Micikevicius et al., arXiv:1710.03740, section 3.2). Weights stay fp32.
        device: where the model is.

    Raises:
        UserError: fp16 on a CPU, whose compiled operators do not know it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "fp16" and device.type == "cpu" and forced_backend() != "reference":
            raise UserError("--fp16 needs a GPU; on a CPU use --bf16")
        self.name = name
        self.dtype = DTYPES[name]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    @property
    def scaled(self) -> bool:
        """Whether steps whose gradients are not finite are skipped."""
        return self.scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, scaled."""
        self.scaler.scale(loss).backward()

    def clip(self, optimizer: torch.optim.Optimizer, module: nn.Module, limit: float) -> float:
        """Unscale the gradients and scale those down whose norm is above ``limit``.

        Returns:
            the norm before; not finite if a gradient is not.
        """
        self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(module.parameters(), limit).item()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights unless a gradient is not finite; then only the scale is lowered."""
        self.scaler.step(optimizer)
        self.scaler.update()

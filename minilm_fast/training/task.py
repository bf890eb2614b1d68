"""What the training loop asks of the thing that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilm_fast.training.distributed import World
from minilm_fast.training.precision import Precision


class Batch(Protocol):
    """One forward pass' input."""

    def to(self, device: torch.device) -> Any:
        """The batch on a device."""


@dataclass(frozen=True)
class StepData:
    """What one optimiser step works on.

    Args:
        batches: the micro-batches of this process, equally many in every process.
        normalizer: what every summed loss of the step is divided by; None: each micro-batch' loss is a mean of its
            own, and the step's loss is the mean of these.
        tokens: tokens that the encoder sees, of all processes.
        flops: floating-point operations of forward and backward pass, of all processes.
        state: what :meth:`Task.load_data_state` needs to go on after this step.
    """

    batches: Sequence[Batch]
    normalizer: float | None
    tokens: int
    flops: float
    state: Mapping[str, Any]


class Task(Protocol):
    """A model with its data.

    Attributes:
        module: called with ``(batch, normalizer)``; gives the loss, or a mapping with ``"loss"`` and further scalars
            to be reported. Its parameters that require gradients are trained.
        find_unused_parameters: whether some of these may take no part in a step.
    """

    find_unused_parameters: bool

    @property
    def module(self) -> nn.Module: ...

    def fingerprint(self) -> dict[str, Any]:
        """What a run is known by beside the loop's own options: plain values by the name of their flag."""

    def step_data(self, step: int) -> StepData:
        """The input of step ``step`` (from 0). Called in the order of the steps, in every process."""

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        """Go on where :attr:`StepData.state` says."""

    def data_state(self) -> dict[str, Any]:
        """The state before the first step."""

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """Measures of the model by name; all processes call it and get the same.

        It draws no random numbers from the generators that training uses.

        Args:
            weights: a folder with the model's present weights.
        """

    def save_weights(self, folder: Path) -> None:
        """Write the weights to a new folder, which appears whole or not at all."""

    def load_weights(self, folder: Path) -> None:
        """Read what :meth:`save_weights` wrote.

        Raises:
            UserError: something is missing or damaged.
        """


def loss_parts(result: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The scalars that a task's module gave, by name."""
    return result if isinstance(result, Mapping) else {"loss": result}

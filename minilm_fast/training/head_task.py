"""What tasks that fine-tune a head on labelled sequences have in common: batches of a step, identity, weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minilm_fast import checkpoint
from minilm_fast.data.orders import LengthGroupedBatches, batch_numbers
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads import HeadModel
from minilm_fast.modeling.heads.packed import PackedHead
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import Batch, StepData


class HeadOptions(Protocol):
    """What the options of such a task have; the names are those of the command line's flags."""

    @property
    def per_gpu_train_batch_size(self) -> int:
        """Sequences of a forward pass."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of a step."""

    @property
    def seed(self) -> int:
        """Of the order of the sequences."""

    @property
    def save_format(self) -> str:
        """Of the weights."""

    @property
    def pad_to_multiple_of(self) -> int:
        """Of the tokens of a batch that goes through the network that is trained."""

    @property
    def eval_dtype(self) -> str | None:
        """What evaluation and prediction compute in; None: as training does."""


class Scorer:
    """Logits of a model in evaluation mode, by its weights as they are when this is made.

    On a CPU the weights are packed (:class:`minilm_fast.modeling.heads.packed.PackedHead`); on a GPU, and in fp16, the
    model itself computes.

    Args:
        dtype: ``"fp32"``, ``"bf16"`` or, on a CPU, ``"int8"``; None: that of ``precision``.
        pad_to_multiple_of: of batches that the model itself computes.

    Attributes:
        multiple: batches should be filled up to a multiple of so many tokens.
    """

    def __init__(self, model: HeadModel, precision: Precision, dtype: str | None, pad_to_multiple_of: int = 1) -> None:
        name = dtype or precision.name
        packed = precision.device.type == "cpu" and name != "fp16"
        self.multiple = 1 if packed else pad_to_multiple_of
        self._run: HeadModel | PackedHead = PackedHead(model, name) if packed else model
        self._precision = precision if packed or name == precision.name else Precision(name, precision.device)

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, token_type_ids: Tensor) -> Tensor:
        """fp32 logits of packed sequences; ``token_type_ids`` int32 ``[tokens]``."""
        if isinstance(self._run, PackedHead):
            return self._run(tokens, token_type_ids=token_type_ids)
        with self._precision.autocast():
            logits: Tensor = self._run(tokens, token_type_ids=token_type_ids)
        return logits.float()


class HeadTask(ABC):
    """The part of a :class:`minilm_fast.training.task.Task` that depends on lengths alone.

    Every epoch is shuffled anew and cut into batches of about equal lengths.

    Args:
        module: gives the loss of a batch.
        lengths: tokens of every training sequence; may be empty if nothing is trained.
        batches_per_group: see :class:`minilm_fast.data.orders.LengthGroupedBatches`.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.

    Raises:
        UserError: the device does not know the dtype of evaluation.
    """

    find_unused_parameters = False

    def __init__(
        self,
        module: nn.Module,
        model: HeadModel,
        tokenizer: Tokenizer,
        lengths: Sequence[int] | np.ndarray,
        options: HeadOptions,
        world: World,
        identity: Mapping[str, Any] | None,
        *,
        batches_per_group: int,
    ) -> None:
        if options.eval_dtype == "int8" and world.device.type != "cpu":
            raise UserError("--eval_dtype int8 is for a CPU: give --no_cuda")
        self.module = module
        self.model = model
        self.tokenizer = tokenizer
        self.world = world
        self.identity = dict(identity or {})
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._options = options
        if len(lengths):
            size = options.per_gpu_train_batch_size
            self.order = LengthGroupedBatches(self._lengths, size, options.seed, batches_per_group)

    @abstractmethod
    def training_batch(self, indices: Sequence[int]) -> Batch:
        """The batch of some training sequences."""

    @abstractmethod
    def forward_flops(self, lengths: np.ndarray) -> float:
        """Floating-point operations of the forward pass over sequences of these lengths."""

    def scorer(self, precision: Precision) -> Scorer:
        """What computes logits with the weights as they are now; the model must be in evaluation mode."""
        options = self._options
        return Scorer(self.model, precision, options.eval_dtype, options.pad_to_multiple_of)

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`."""
        options = self._options
        return {
            "per_gpu_train_batch_size": options.per_gpu_train_batch_size,
            "gradient_accumulation_steps x processes": self.world.size * options.gradient_accumulation_steps,
            **self.identity,
        }

    def step_data(self, step: int) -> StepData:
        """See :class:`minilm_fast.training.task.Task`."""
        count, size = self._options.gradient_accumulation_steps, self.world.size
        chosen = [self.order[number] for number in batch_numbers(step, count * size)]
        lengths = self._lengths[[index for batch in chosen for index in batch]]
        return StepData(
            batches=[self.training_batch(batch) for batch in chosen[self.world.rank :: size]],
            normalizer=None,
            tokens=int(lengths.sum()),
            flops=3 * self.forward_flops(lengths),
            state=self.data_state(),
        )

    def data_state(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`; the number of a step says all."""
        return {}

    def load_data_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - there is nothing to load
        """See :class:`minilm_fast.training.task.Task`."""

    def save_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`; transformers' class of the same purpose loads it."""
        self.model.save_pretrained(folder, self.tokenizer, weight_format=self._options.save_format)

    def load_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        loaded = checkpoint.load(folder, for_training=True)
        state = {**loaded.state, **loaded.extra_state}
        own = self.model.state_dict()
        wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            raise UserError(f"{folder}: {wrong[0]} of shape {list(own[wrong[0]].shape)} is missing")
        self.model.load_state_dict({name: state[name] for name in own})

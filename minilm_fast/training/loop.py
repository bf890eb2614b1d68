"""The training loop: batches, optimiser steps, logging, checkpoints."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm_fast.atomic import atomic_write
from minilm_fast.data.batching import PackedBatch, collate
from minilm_fast.data.orders import LengthGroupedBatches, sequential_batch
from minilm_fast.data.pseudo_masking import Feature, Masking, PseudoMasker, SpecialIds, framed_lengths
from minilm_fast.errors import UserError
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training import checkpointing
from minilm_fast.training.optimizer import AdamW, linear_schedule, parameter_groups

logger = logging.getLogger(__name__)

# The original fetches this many samples to log them before it trains, which uses up random numbers.
_INSPECTED_SAMPLES = 5


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of a run; the names are those of the command line's flags."""

    max_source_seq_length: int = 464
    max_target_seq_length: int = 48
    per_gpu_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_training_steps: int = -1
    num_training_epochs: int = 10
    num_warmup_steps: int = 0
    logging_steps: int = 500
    save_steps: int = 1500
    seed: int = 42
    bf16: bool = False
    group_by_length: bool = False
    masking: Masking = field(default_factory=Masking)


class Trainer:
    """Trains one model on one device.

    Args:
        features: the training set; shuffled here, in place, as the original does.
        dev_features: if not empty, its loss is logged at every checkpoint.
    """

    def __init__(
        self,
        model: Seq2SeqModel,
        tokenizer: Tokenizer,
        special: SpecialIds,
        features: list[Feature],
        dev_features: Sequence[Feature],
        options: TrainingOptions,
        output_dir: Path,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.special = special
        self.features = features
        self.dev_features = dev_features
        self.options = options
        self.output_dir = output_dir
        self.rng = random.Random(options.seed)
        self.masker = self._masker(options.masking, self.rng)
        self.optimizer = AdamW(
            parameter_groups(model, options.weight_decay), lr=options.learning_rate, eps=options.adam_epsilon
        )
        self.rng.shuffle(features)
        for feature in features[:_INSPECTED_SAMPLES]:
            self.masker(feature)
        self.grouped: LengthGroupedBatches | None = None
        if options.group_by_length:
            lengths = [self._packed_length(feature) for feature in features]
            self.grouped = LengthGroupedBatches(lengths, options.per_gpu_train_batch_size, options.seed)
        self.total_steps = self._total_steps()
        self.step = 0
        self.history: list[dict[str, float]] = []

    def _masker(self, masking: Masking, rng: random.Random) -> PseudoMasker:
        options = self.options
        return PseudoMasker(self.special, masking, options.max_source_seq_length, options.max_target_seq_length, rng)

    def _packed_length(self, feature: Feature) -> int:
        options = self.options
        source, target = framed_lengths(feature, options.max_source_seq_length, options.max_target_seq_length)
        return source + 2 * target

    def _total_steps(self) -> int:
        options = self.options
        if options.num_training_steps > 0:
            return options.num_training_steps
        per_step = options.per_gpu_train_batch_size * options.gradient_accumulation_steps
        return math.ceil(len(self.features) * options.num_training_epochs / per_step)

    def _batch(self, number: int) -> PackedBatch:
        if self.grouped is not None:
            indices = self.grouped[number]
        else:
            indices = sequential_batch(number, self.options.per_gpu_train_batch_size, len(self.features))
        return collate([self.masker(self.features[i]) for i in indices])

    def _loss(self, batch: PackedBatch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.bf16):
            return self.model(batch)

    def train_step(self) -> tuple[list[float], float, int]:
        """One optimiser step.

        Returns:
            the losses of its batches, the gradient norm before clipping, the number of tokens.

        Raises:
            UserError: the loss is not finite; nothing has been updated.
        """
        accumulation = self.options.gradient_accumulation_steps
        losses, tokens = [], 0
        for i in range(accumulation):
            batch = self._batch(self.step * accumulation + i)
            loss = self._loss(batch)
            losses.append(loss.item())
            tokens += batch.tokens
            if not math.isfinite(losses[-1]):
                raise UserError(f"step {self.step + 1}: the loss is {losses[-1]}; try a lower --learning_rate")
            (loss / accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses, norm.item(), tokens

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        options = self.options
        return options.learning_rate * linear_schedule(self.step, options.num_warmup_steps, self.total_steps)

    @torch.no_grad()
    def dev_loss(self) -> float:
        """Mean loss of a predicted token of the dev set, each asked for with ``[MASK]`` after the true target."""
        masker = self._masker(Masking(0.0, 0.0, -1.0, -1.0), random.Random(0))
        ordered = sorted(self.dev_features, key=self._packed_length)
        size = self.options.per_gpu_train_batch_size
        total = count = 0.0
        self.model.eval()
        for start in range(0, len(ordered), size):
            batch = collate([masker(f) for f in ordered[start : start + size]])
            rows = batch.weights.sum().item()
            total += self._loss(batch).item() * rows
            count += rows
        self.model.train()
        return total / count

    def resume(self) -> None:
        """Go on from the last whole checkpoint in the output folder, whose weights the model already holds."""
        step = checkpointing.latest_step(self.output_dir)
        if step is None:
            return
        progress = checkpointing.restore(self.output_dir, step, self.optimizer, self.rng)
        self.step = step
        self.history = progress["history"]
        logger.info("resuming after step %d", step)

    def save(self) -> None:
        """Write a checkpoint, and the dev loss if there is a dev set."""
        record: dict[str, float] = {"step": self.step, "learning_rate": self.learning_rate}
        if self.dev_features:
            record["dev_loss"] = self.dev_loss()
            logger.info("step %d  dev loss %.4f", self.step, record["dev_loss"])
        self.history.append(record)
        progress: dict[str, Any] = {"history": self.history}
        folder = checkpointing.save(
            self.output_dir, self.step, self.model, self.optimizer, self.rng, self.tokenizer, progress
        )
        with atomic_write(self.output_dir / "history.json") as file:
            file.write(json.dumps(self.history, indent=1).encode())
        logger.info("saved %s", folder)

    def hint(self) -> str:
        """What a message about a run that was cut short ends with."""
        if not self.history:
            return ""
        return f"; the same command goes on after step {self.history[-1]['step']}"

    def train(self) -> None:
        """Run to the last step; save every ``save_steps`` and at the end."""
        options = self.options
        self.model.train()
        losses: list[float] = []
        tokens, logged, since = 0, self.step, time.perf_counter()
        while self.step < self.total_steps:
            rate = self.learning_rate
            step_losses, norm, step_tokens = self.train_step()
            losses += step_losses
            tokens += step_tokens
            if self.step % options.logging_steps == 0:
                elapsed = time.perf_counter() - since
                left = elapsed / (self.step - logged) * (self.total_steps - self.step)
                logger.info(
                    "step %d/%d  loss %.4f  lr %.3g  grad norm %.2f  %.0f tokens/s  %.0f min left",
                    self.step, self.total_steps, sum(losses) / len(losses), rate, norm, tokens / elapsed, left / 60,
                )  # fmt: skip
                losses, tokens, logged, since = [], 0, self.step, time.perf_counter()
            if self.step % options.save_steps == 0 or self.step == self.total_steps:
                self.save()

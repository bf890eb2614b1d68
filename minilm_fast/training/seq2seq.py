"""Sequence-to-sequence fine-tuning as a task of the training loop."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm_fast import checkpoint
from minilm_fast.data.batching import PackedBatch, collate
from minilm_fast.data.features import FeatureStore
from minilm_fast.data.masking import Feature, Masker, Masking, Sample, SpecialIds, make_masker
from minilm_fast.data.orders import (
    BatchOrder,
    LengthGroupedBatches,
    TokenBudgetBatches,
    batch_numbers,
    mean_predictions,
    sequential_batch,
)
from minilm_fast.errors import UserError
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import sequence_to_sequence_flops
from minilm_fast.training.generation import Generation
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import StepData

# The original fetches this many samples to log them before it trains, which uses up random numbers.
_INSPECTED_SAMPLES = 5
# As the network adds it to the sum of the weights.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Seq2SeqOptions:
    """Settings of the data; the names are those of the command line's flags.

    Args:
        max_tokens: if given, a batch is as many examples as fit into it, and ``per_gpu_train_batch_size`` is that of
            the dev set only. Every predicted token of the data then weighs the same, in whatever batch it is.
        pad_to_multiple_of: see :func:`minilm_fast.data.batching.collate`.
    """

    max_source_seq_length: int = 464
    max_target_seq_length: int = 48
    per_gpu_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    mask_way: str = "v2"
    num_max_mask_token: int = 0
    masking: Masking = field(default_factory=Masking)
    max_tokens: int | None = None
    group_by_length: bool = False
    average_tokens_across_batches: bool = False
    seed: int = 42
    save_format: str = "both"
    pad_to_multiple_of: int = 1


def steps_of_epochs(examples: int, epochs: float, global_batch: int) -> int:
    """Optimiser steps in which every example is seen ``epochs`` times."""
    return math.ceil(examples * epochs / global_batch)


class Batches:
    """The examples of each micro-batch of each step, the same in every process.

    Micro-batch ``i`` of a step belongs to process ``i % processes``; a process goes through its own in order.

    Args:
        features: gone through in an order that the constructor shuffles with ``rng``, as the original does.
        masker: for the lengths of samples.
        processes: how many share a step.

    Attributes:
        normalizer: the mean number of labels of a step, if the number of a batch's examples varies.
    """

    def __init__(
        self, features: Sequence[Feature], masker: Masker, options: Seq2SeqOptions, processes: int, rng: random.Random
    ) -> None:
        self.features = features
        self.size = options.per_gpu_train_batch_size
        self.count = processes * options.gradient_accumulation_steps
        self.order = list(range(len(features)))
        rng.shuffle(self.order)
        self.grouped: BatchOrder | None = None
        self.across = options.average_tokens_across_batches and options.max_tokens is None
        self.normalizer: float | None = None
        if options.max_tokens is not None:
            lengths = _lengths(masker, features)[self.order]
            budget = TokenBudgetBatches(lengths, options.max_tokens, options.seed, by_length=options.group_by_length)
            self.grouped = budget
            self.normalizer = self.count * mean_predictions(budget, masker.predictions(_feature_lengths(features)[1]))
        elif options.group_by_length:
            lengths = _lengths(masker, features)[self.order]
            size = self.size * self.count if self.across else self.size
            if self.across and size > len(lengths):
                raise UserError(
                    f"--group_by_length with --average_tokens_across_batches needs at least the {size} examples of a "
                    f"step, there are {len(lengths)}"
                )
            self.grouped = LengthGroupedBatches(lengths, size, options.seed)

    def _indices(self, step: int) -> list[list[int]]:
        numbers = batch_numbers(step, self.count)
        if self.grouped is None:
            return [sequential_batch(number, self.size, len(self.order)) for number in numbers]
        if not self.across:
            return [self.grouped[number] for number in numbers]
        whole = self.grouped[step]
        return [whole[start : start + self.size] for start in range(0, len(whole), self.size)]

    def steps_in(self, epochs: int) -> int:
        """Steps in which every example is seen ``epochs`` times."""
        if self.grouped is not None:
            return math.ceil(self.grouped.batches_in(epochs) / (1 if self.across else self.count))
        return steps_of_epochs(len(self.order), epochs, self.size * self.count)

    def __getitem__(self, step: int) -> list[list[Feature]]:
        return [[self.features[self.order[i]] for i in indices] for indices in self._indices(step)]


def _lengths(masker: Masker, features: Sequence[Feature]) -> np.ndarray:
    """Tokens of every feature's sample."""
    return sum(masker.segments(*_feature_lengths(features)))


def _feature_lengths(features: Sequence[Feature]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the sources and targets."""
    if isinstance(features, FeatureStore):
        return features.lengths()
    source = np.array([len(feature.source_ids) for feature in features])
    return source, np.array([len(feature.target_ids) for feature in features])


class Seq2SeqTask:
    """Fine-tunes one network on s2s-ft data.

    Args:
        features: the training set.
        dev_features: if not empty, their loss is measured at every checkpoint.
        generation: if given, its scores too.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.
        world: all its processes draw the same samples, and each keeps its share.
    """

    find_unused_parameters = False

    def __init__(
        self,
        model: Seq2SeqModel,
        tokenizer: Tokenizer,
        special: SpecialIds,
        features: Sequence[Feature],
        dev_features: Sequence[Feature],
        options: Seq2SeqOptions,
        world: World,
        identity: Mapping[str, Any] | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.module = model
        self.tokenizer = tokenizer
        self.special = special
        self.dev_features = dev_features
        self.options = options
        self.world = world
        self.identity = dict(identity or {})
        self.generation = generation
        self.rng = random.Random(options.seed)
        self.masker = self._masker(options.masking, self.rng)
        self.batches = Batches(features, self.masker, options, world.size, self.rng)
        for i in self.batches.order[:_INSPECTED_SAMPLES]:
            self.masker(features[i])

    def _masker(self, masking: Masking, rng: random.Random) -> Masker:
        options = self.options
        return make_masker(
            options.mask_way,
            self.special,
            masking,
            options.max_source_seq_length,
            options.max_target_seq_length,
            rng,
            options.num_max_mask_token,
        )

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`."""
        options = self.options
        names = ("max_source_seq_length", "max_target_seq_length", "mask_way", "num_max_mask_token", "group_by_length")
        values: dict[str, Any] = {name: getattr(options, name) for name in names}
        values["average_tokens_across_batches"] = options.average_tokens_across_batches
        if options.max_tokens is not None:
            values["max_tokens"] = options.max_tokens
        values |= {name: getattr(options.masking, name) for name in Masking.__dataclass_fields__}
        per_step = self.world.size * options.gradient_accumulation_steps
        if options.average_tokens_across_batches:
            values["per_gpu_train_batch_size x gradient_accumulation_steps x processes"] = (
                per_step * options.per_gpu_train_batch_size
            )
        else:
            values["per_gpu_train_batch_size"] = options.per_gpu_train_batch_size
            values["gradient_accumulation_steps x processes"] = per_step
        return values | self.identity

    def step_data(self, step: int) -> StepData:
        """See :class:`minilm_fast.training.task.Task`."""
        samples = [[self.masker(feature) for feature in features] for features in self.batches[step]]
        counts = [(len(s.source), len(s.target), len(s.pseudo)) for batch in samples for s in batch]
        predicted = sum(len(s.labels) for batch in samples for s in batch)
        normalizer = self.batches.normalizer
        if self.options.average_tokens_across_batches:
            normalizer = predicted + _EPSILON
        return StepData(
            batches=[self._collate(batch) for batch in samples[self.world.rank :: self.world.size]],
            normalizer=normalizer,
            tokens=sum(map(sum, counts)),
            flops=sequence_to_sequence_flops(self.module.config, counts, predicted),
            state=self.data_state(),
        )

    def _collate(self, samples: list[Sample]) -> PackedBatch:
        return collate(samples, self.options.pad_to_multiple_of)

    def data_state(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`."""
        version, internal, gauss = self.rng.getstate()
        return {"python": [version, list(internal), gauss]}

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        version, internal, gauss = state["python"]
        self.rng.setstate((version, tuple(internal), gauss))

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """See :class:`minilm_fast.training.task.Task`."""
        measures = {"dev_loss": self.dev_loss(precision)} if len(self.dev_features) else {}
        return measures | (self.generation.measure(world, weights) if self.generation is not None else {})

    @torch.no_grad()
    def dev_loss(self, precision: Precision) -> float:
        """Mean loss of a predicted token of the dev set, without dropout and without random replacements.

        v0 and v2 predict every target token after the true ones before it; v1 predicts a share of them, the same
        at every call.
        """
        share = self.options.masking.target_mask_prob if self.options.mask_way == "v1" else -1.0
        masker = self._masker(Masking(0.0, 0.0, -1.0, share), random.Random(0))
        ordered = [self.dev_features[i] for i in _lengths(masker, self.dev_features).argsort(kind="stable")]
        size = self.options.per_gpu_train_batch_size
        batches = [[masker(f) for f in ordered[start : start + size]] for start in range(0, len(ordered), size)]
        was_training = self.module.training
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in batches[self.world.rank :: self.world.size]:
            total += self._summed_loss(batch, precision)
        self.module.train(was_training)
        loss, rows = self.world.sum(total).tolist()
        return loss / rows

    def _summed_loss(self, samples: list[Sample], precision: Precision) -> torch.Tensor:
        batch = self._collate(samples).to(self.world.device)
        with precision.autocast():
            loss = self.module(batch, 1.0)
        return torch.stack([loss.double(), batch.weights.sum().double()])

    def save_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        checkpoint.save(
            folder,
            self.module.config,
            {name: tensor.cpu() for name, tensor in self.module.checkpoint_state().items()},
            self.tokenizer,
            weight_format=self.options.save_format,
        )

    def load_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        loaded = checkpoint.load(folder, for_training=True)
        own = self.module.state_dict()
        absent = sorted(own.keys() - loaded.state.keys())
        if absent:
            raise UserError(f"cannot resume from {folder}: {absent[0]} is missing")
        self.module.load_state_dict({name: loaded.state[name] for name in own})

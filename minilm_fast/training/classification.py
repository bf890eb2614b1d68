"""Fine-tuning a classifier of sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast import checkpoint
from minilm_fast.data.glue import ClassificationFeature
from minilm_fast.data.orders import LengthGroupedBatches, batch_numbers
from minilm_fast.errors import UserError
from minilm_fast.modeling.classification import ClassificationBatch, SequenceClassifier
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import encoder_flops
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import StepData


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of label 1; 0 if nothing was found."""
    found = int(((predictions == 1) & (labels == 1)).sum())
    return 2 * found / max(1, int((predictions == 1).sum() + (labels == 1).sum()))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes; 0 if a margin is empty."""
    both = [int(((predictions == p) & (labels == t)).sum()) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1))]
    tp, tn, fp, fn = both
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0.0


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}


@dataclass(frozen=True)
class ClassificationOptions:
    """Settings of the data; the names are those of the command line's flags.

    Args:
        metrics: keys of ``METRICS``, measured on the dev set beside its loss.
    """

    per_gpu_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    seed: int = 42
    metrics: tuple[str, ...] = ("accuracy",)
    save_format: str = "safetensors"


class ClassificationModule(nn.Module):
    """The loss of a batch: the mean cross-entropy of its labels, or their sum over ``normalizer``."""

    def __init__(self, model: SequenceClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ClassificationBatch, normalizer: float | None = None) -> Tensor:
        """fp32 scalar."""
        losses = F.cross_entropy(self.model(batch).float(), batch.labels, reduction="sum")
        return losses / (len(batch.labels) if normalizer is None else normalizer)


class ClassificationTask:
    """Trains a classifier on features.

    Args:
        dev: if not empty, loss and metrics are measured on it at every checkpoint.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.
    """

    find_unused_parameters = False

    def __init__(
        self,
        model: SequenceClassifier,
        tokenizer: Tokenizer,
        features: Sequence[ClassificationFeature],
        dev: Sequence[ClassificationFeature],
        options: ClassificationOptions,
        world: World,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.module = ClassificationModule(model)
        self.model = model
        self.tokenizer = tokenizer
        self.features = features
        self.dev = dev
        self.options = options
        self.world = world
        self.identity = dict(identity or {})
        lengths = [len(feature.input_ids) for feature in features]
        self.order = LengthGroupedBatches(lengths, options.per_gpu_train_batch_size, options.seed, 1)

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`."""
        options = self.options
        per_step = self.world.size * options.gradient_accumulation_steps
        return {
            "per_gpu_train_batch_size": options.per_gpu_train_batch_size,
            "gradient_accumulation_steps x processes": per_step,
            **self.identity,
        }

    def step_data(self, step: int) -> StepData:
        """See :class:`minilm_fast.training.task.Task`."""
        count, size = self.options.gradient_accumulation_steps, self.world.size
        numbers = batch_numbers(step, count * size)
        chosen = [[self.features[i] for i in self.order[number]] for number in numbers]
        lengths = np.array([len(feature.input_ids) for features in chosen for feature in features])
        config = self.model.config
        forward = encoder_flops(config, int(lengths.sum()), int((lengths**2).sum()), config.num_hidden_layers)
        return StepData(
            batches=[ClassificationBatch.collate(features) for features in chosen[self.world.rank :: size]],
            normalizer=None,
            tokens=int(lengths.sum()),
            flops=3 * forward,
            state=self.data_state(),
        )

    def data_state(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`; the number of a step says all."""
        return {}

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`minilm_fast.training.task.Task`."""

    @torch.no_grad()
    def predict(self, features: Sequence[ClassificationFeature], precision: Precision) -> np.ndarray:
        """Logits fp32 ``[features, num_labels]`` of the model as it is; call it in evaluation mode."""
        size = self.options.per_gpu_train_batch_size
        order = np.argsort([len(feature.input_ids) for feature in features], kind="stable")
        logits = np.zeros((len(features), self.model.classifier.out_features), dtype=np.float32)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = ClassificationBatch.collate([features[i] for i in chosen]).to(self.world.device)
            with precision.autocast():
                logits[chosen] = self.model(batch).float().cpu().numpy()
        return logits

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """``dev_loss`` and each metric; every process computes a share."""
        if not len(self.dev):
            return {}
        shares = world.gather(self.predict(self.dev[world.rank :: world.size], precision))
        logits = np.zeros((len(self.dev), shares[0].shape[1]), dtype=np.float32)
        for rank, share in enumerate(shares):
            logits[rank :: world.size] = share
        labels = np.array([feature.label for feature in self.dev])
        loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        predictions = logits.argmax(1)
        return {"dev_loss": loss} | {f"dev_{name}": METRICS[name](predictions, labels) for name in self.options.metrics}

    def save_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`; ``AutoModelForSequenceClassification`` loads it."""
        labels = {str(i): f"LABEL_{i}" for i in range(self.model.classifier.out_features)}
        named = {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
        config = self.model.config.replace(extra={**self.model.config.extra, **named})
        state = {name: tensor.cpu() for name, tensor in self.model.checkpoint_state().items()}
        checkpoint.save(folder, config, state, self.tokenizer, weight_format=self.options.save_format)

    def load_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        loaded = checkpoint.load(folder, for_training=True)
        state = {**loaded.state, **loaded.extra_state}
        disk = self.model.disk_names()
        own = self.model.state_dict()
        absent = sorted(disk.get(name, name) for name in own if disk.get(name, name) not in state)
        if absent:
            raise UserError(f"cannot resume from {folder}: {absent[0]} is missing")
        self.model.load_state_dict({name: state[disk.get(name, name)] for name in own})

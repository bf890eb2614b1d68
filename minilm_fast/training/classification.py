"""Fine-tuning a classifier of sequences, or a regression on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.atomic import atomic_write
from minilm_fast.data.classification import ClassificationFeatures
from minilm_fast.metrics.classification import METRICS
from minilm_fast.modeling.classification import ClassificationBatch, SequenceClassifier
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import first_token_flops
from minilm_fast.training.head_task import HeadTask, Scorer
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import StepData

Sets = Mapping[str, ClassificationFeatures]
"""Data sets by name; one alone may have the name ``""``."""


@dataclass(frozen=True)
class ClassificationOptions:
    """Settings of the data; the names are those of the command line's flags.

    Args:
        metrics: keys of :data:`minilm_fast.metrics.classification.METRICS`, measured on a set beside its loss.
        regression: labels are scores: the loss is the squared error, a prediction the one logit.
        pad_to_multiple_of: see :meth:`minilm_fast.modeling.classification.ClassificationBatch.collate`.
        eval_dtype: see :class:`minilm_fast.training.head_task.Scorer`.
    """

    per_gpu_train_batch_size: int = 32
    per_gpu_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    seed: int = 42
    metrics: tuple[str, ...] = ("accuracy",)
    regression: bool = False
    save_format: str = "safetensors"
    pad_to_multiple_of: int = 1
    eval_dtype: str | None = None


def options_of(
    args: argparse.Namespace, metrics: tuple[str, ...] = ("accuracy",), *, regression: bool = False
) -> ClassificationOptions:
    """The options that the flags of :func:`minilm_fast.training.flags.add_understanding_flags` say."""
    return ClassificationOptions(
        per_gpu_train_batch_size=args.per_gpu_train_batch_size,
        per_gpu_eval_batch_size=args.per_gpu_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        seed=args.seed,
        metrics=metrics,
        regression=regression,
        save_format=args.save_format,
        pad_to_multiple_of=64 if args.bf16 or args.fp16 else 1,
        eval_dtype=args.eval_dtype,
    )


@dataclass(frozen=True)
class Submission:
    """Predictions that are to be written.

    Args:
        name: of the file, which gets the ending ``.tsv``.
        numbers: first column of each line.
        show: text of a prediction (the number of a label, or a score).
    """

    name: str
    numbers: Sequence[object]
    features: ClassificationFeatures
    show: Callable[[float], str]


class ClassificationModule(nn.Module):
    """The loss of a batch: the mean of its examples' losses, or their sum over ``normalizer``."""

    def __init__(self, model: SequenceClassifier, regression: bool = False) -> None:
        super().__init__()
        self.model = model
        self.regression = regression

    def forward(self, batch: ClassificationBatch, normalizer: float | None = None) -> Tensor:
        """fp32 scalar."""
        logits = self.model(batch.tokens, token_type_ids=batch.token_type_ids)[: len(batch.labels)]
        return loss_sum(logits, batch.labels, self.regression) / (
            len(batch.labels) if normalizer is None else normalizer
        )


def loss_sum(logits: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Sum of the cross-entropies, or of the squared errors, fp32.

    Args:
        logits: ``[examples, num_labels]``; for a regression ``[examples, 1]``.
        labels: int64 or fp32 ``[examples]``.
    """
    if regression:
        return F.mse_loss(logits.float().squeeze(1), labels, reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


class ClassificationTask(HeadTask):
    """Trains a classifier on features; also an :class:`minilm_fast.training.understanding.UnderstandingTask`.

    Args:
        features: may be empty if nothing is trained.
        dev: measured at checkpoints.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.
        test: labelled sets that are measured once, at the end.
        submissions: see :meth:`predict_files`.
        on_report: called in the first process with what :meth:`report` found, and the output folder.
    """

    model: SequenceClassifier

    def __init__(
        self,
        model: SequenceClassifier,
        tokenizer: Tokenizer,
        features: ClassificationFeatures,
        dev: Sets,
        options: ClassificationOptions,
        world: World,
        identity: Mapping[str, Any] | None = None,
        *,
        test: Sets | None = None,
        submissions: Sequence[Submission] = (),
        on_report: Callable[[Mapping[str, float], Path], None] | None = None,
    ) -> None:
        module = ClassificationModule(model, options.regression)
        super().__init__(module, model, tokenizer, features.lengths, options, world, identity, batches_per_group=1)
        self.features = features
        self.dev = dict(dev)
        self.options = options
        self.test = dict(test or {})
        self.submissions = submissions
        self.on_report = on_report
        # Logits of the test sets by the weights as they are.
        self._known: dict[ClassificationFeatures, np.ndarray] = {}

    def step_data(self, step: int) -> StepData:
        """See :class:`HeadTask`."""
        self._known.clear()
        return super().step_data(step)

    def load_weights(self, folder: Path) -> None:
        """See :class:`HeadTask`."""
        self._known.clear()
        super().load_weights(folder)

    def training_batch(self, indices: Sequence[int]) -> ClassificationBatch:
        """See :class:`HeadTask`."""
        return self._collate(self.features, indices, self.options.pad_to_multiple_of)

    def forward_flops(self, lengths: np.ndarray) -> float:
        """See :class:`HeadTask`."""
        return first_token_flops(self.model.config, lengths)

    def _collate(self, features: ClassificationFeatures, chosen: Iterable[int], multiple: int) -> ClassificationBatch:
        examples = [features[int(i)] for i in chosen]
        return ClassificationBatch.collate(examples, scores=self.options.regression, multiple=multiple)

    def logits(self, features: ClassificationFeatures, world: World, scorer: Scorer) -> np.ndarray:
        """fp32 ``[features, num_labels]``; each process computes a share and all get all."""
        own = np.arange(world.rank, len(features), world.size)
        # Long ones first, so that what does not fit into memory is found at once.
        own = own[np.argsort(-features.lengths[own], kind="stable")]
        size = self.options.per_gpu_eval_batch_size
        logits = np.zeros((len(features), len(self.model.labels)), dtype=np.float32)
        for start in range(0, len(own), size):
            chosen = own[start : start + size]
            batch = self._collate(features, chosen, scorer.multiple).to(world.device)
            logits[chosen] = scorer(batch.tokens, batch.token_type_ids)[: len(chosen)].cpu().numpy()
        for rank, share in enumerate(world.gather(logits[world.rank :: world.size])):
            logits[rank :: world.size] = share
        return logits

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Numbers of labels, or scores: ``[examples]``."""
        return logits[:, 0] if self.options.regression else logits.argmax(1)

    def measure(self, sets: Sets, prefix: str, world: World, precision: Precision) -> dict[str, float]:
        """``PREFIX_loss`` and ``PREFIX_METRIC`` over all sets; of several also ``PREFIX_SET_METRIC`` of each."""
        if not sets:
            return {}
        scorer = self.scorer(precision)
        return self._all_measures(sets, {each: self.logits(each, world, scorer) for each in sets.values()}, prefix)

    def _all_measures(
        self, sets: Sets, logits: Mapping[ClassificationFeatures, np.ndarray], prefix: str
    ) -> dict[str, float]:
        if not sets:
            return {}
        labels = np.concatenate([features.labels for features in sets.values()])
        measures = self._measures(np.concatenate([logits[each] for each in sets.values()]), labels, prefix)
        if len(sets) > 1:
            for name, features in sets.items():
                measures |= self._measures(logits[features], features.labels, f"{prefix}_{name}")
        return measures

    def measure_names(self) -> list[str]:
        """The names of what :meth:`evaluate` gives."""
        sets = ["dev", *(f"dev_{name}" for name in self.dev)] if len(self.dev) > 1 else ["dev"] * len(self.dev)
        return [f"{name}_{measure}" for name in sets for measure in ("loss", *self.options.metrics)]

    def _measures(self, logits: np.ndarray, labels: np.ndarray, prefix: str) -> dict[str, float]:
        truth = torch.from_numpy(labels).to(torch.float32 if self.options.regression else torch.int64)
        loss = loss_sum(torch.from_numpy(logits), truth, self.options.regression).item() / len(labels)
        predictions = self.predictions(logits)
        values = {name: METRICS[name](predictions, labels) for name in self.options.metrics}
        return {f"{prefix}_loss": loss} | {f"{prefix}_{name}": value for name, value in values.items()}

    def _test_logits(
        self, sets: Iterable[ClassificationFeatures], world: World, precision: Precision
    ) -> Mapping[ClassificationFeatures, np.ndarray]:
        """Logits of test sets; those of one that is both scored and predicted are computed once."""
        missing = [features for features in sets if features not in self._known]
        if missing:
            scorer = self.scorer(precision)
            self._known |= {features: self.logits(features, world, scorer) for features in missing}
        return self._known

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """``dev_loss`` and each metric, see :meth:`measure`."""
        return self.measure(self.dev, "dev", world, precision)

    def report(self, world: World, precision: Precision, output_dir: Path) -> dict[str, float]:
        """The same of the test sets, named ``test_...``."""
        logits = self._test_logits(self.test.values(), world, precision)
        measures = self._all_measures(self.test, logits, "test")
        if self.on_report is not None:
            show = self.on_report
            world.on_main(lambda: show(measures, output_dir))
        return measures

    def predict_files(self, world: World, precision: Precision, output_dir: Path) -> list[Path]:
        """A file for each submission: ``index`` and ``prediction``, as GLUE wants them."""
        paths = []
        logits = self._test_logits([each.features for each in self.submissions], world, precision)
        for submission in self.submissions:
            predictions = self.predictions(logits[submission.features])
            rows = zip(submission.numbers, map(submission.show, predictions.tolist()), strict=True)
            text = "index\tprediction\n" + "".join(f"{number}\t{shown}\n" for number, shown in rows)
            paths.append(output_dir / f"{submission.name}.tsv")

            def write(path: Path = paths[-1], text: str = text) -> None:
                with atomic_write(path) as file:
                    file.write(text.encode())

            world.on_main(write)
        return paths

"""Distillation as a task of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.corpus_cache import PackedSequences
from minilm_fast.data.orders import LengthGroupedBatches, batch_numbers
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.distillation.distiller import Distiller
from minilm_fast.distillation.sides import MODULES, SideInputs, project
from minilm_fast.distillation.student import Student, freeze_untrained
from minilm_fast.errors import UserError
from minilm_fast.ops.layout import SequenceLayout
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import encoder_flops
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import StepData

# BERT (arXiv 1810.04805), appendix A.1: share of the tokens that are predicted, and of these the share that becomes
# [MASK] and the share that becomes a random token.
_PREDICTED, _MASKED, _RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class DistillOptions:
    """Settings of the data; the names are those of the command line's flags.

    Args:
        mlm_weight: of a masked-language-model loss of the student; 0: none.
        pad_to_multiple_of: the number of tokens of a batch becomes a multiple of this one; what is missing is one more
            sequence, which no loss counts (see :func:`minilm_fast.data.batching.collate`).
        save_format: of the weights.
    """

    per_gpu_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    seed: int = 42
    mlm_weight: float = 0.0
    pad_to_multiple_of: int = 1
    save_format: str = "safetensors"


@dataclass(frozen=True)
class DistillBatch:
    """What one forward pass works on.

    Attributes:
        tokens: the sequences, maybe followed by one that only fills up.
        layout: of the sequences that count.
        predicted, labels: int64 ``[rows]``: tokens that the masked language model predicts, and what they are.
    """

    tokens: TokenBatch
    layout: SequenceLayout
    predicted: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> DistillBatch:
        """The same batch on a device."""
        tokens = self.tokens.to(device)
        layout = tokens.layout if self.layout is self.tokens.layout else self.layout.to(device)
        predicted, labels = (x.to(device, non_blocking=True) for x in (self.predicted, self.labels))
        return replace(self, tokens=tokens, layout=layout, predicted=predicted, labels=labels)


def make_batch(sequences: Sequence[np.ndarray], multiple: int = 1) -> DistillBatch:
    """A batch without anything to predict."""
    tokens = sum(len(sequence) for sequence in sequences)
    filler = [np.zeros(-tokens % multiple, dtype=np.int32)] if -tokens % multiple else []
    batch = TokenBatch.from_sequences([*sequences, *filler])
    # The filler may be longer than the models' position tables.
    batch.position_ids[tokens:] = 0
    layout = SequenceLayout.bidirectional([len(s) for s in sequences]) if filler else batch.layout
    nothing = torch.zeros(0, dtype=torch.int64)
    return DistillBatch(batch, layout, nothing, nothing)


def mask_batch(batch: DistillBatch, tokenizer: Tokenizer, rng: np.random.RandomState) -> DistillBatch:
    """BERT's masking: some of the tokens are predicted, most of them hidden; special tokens never are."""
    ids = batch.tokens.input_ids.numpy().copy()
    labels = ids.copy()
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]
    candidates = np.flatnonzero(~np.isin(ids[: batch.layout.total], special))
    chosen = candidates[rng.random_sample(len(candidates)) < _PREDICTED]
    fate = rng.random_sample(len(chosen))
    ids[chosen[fate < _MASKED]] = tokenizer.mask_id
    swapped = chosen[(fate >= _MASKED) & (fate < _MASKED + _RANDOM)]
    ids[swapped] = rng.randint(0, tokenizer.vocab_size, len(swapped))
    tokens = replace(batch.tokens, input_ids=torch.from_numpy(ids))
    return replace(
        batch,
        tokens=tokens,
        predicted=torch.from_numpy(chosen),
        labels=torch.from_numpy(labels[chosen].astype(np.int64)),
    )


class DistillationModule(nn.Module):
    """The loss of a batch and its parts, with the student as the only submodule that has parameters.

    Args:
        distiller: its student is a :class:`Student`, whose head the masked language model needs.
    """

    def __init__(self, distiller: Distiller, mlm_weight: float = 0.0) -> None:
        super().__init__()
        self.distiller = distiller
        self.mlm_weight = mlm_weight

    def forward(self, batch: DistillBatch, normalizer: float | None = None) -> dict[str, Tensor]:
        """``"loss"``, each relation's loss by its name, and ``"mlm"`` if it has a weight."""
        distiller, inputs = self.distiller, SideInputs(batch.tokens)
        teacher = distiller.teacher_vectors(inputs)
        hidden: list[Tensor] = []
        if self.mlm_weight:
            encoder = distiller.student.bert
            tokens = batch.tokens
            hidden = list(encoder.hidden_states(tokens.input_ids, tokens.position_ids, tokens.layout))
            at = distiller.student_layer - 1
            student = project(encoder.encoder.layer[at].attention.self, hidden[at], distiller.names)
        else:
            student = distiller.student_vectors(inputs)
        rows = batch.layout.total
        result = distiller.compare(_first(teacher, rows), _first(student, rows), batch.layout)
        loss, parts = result.loss, dict(result.relations)
        if self.mlm_weight:
            mlm = distiller.student.predictions_loss(hidden[-1][batch.predicted], batch.labels)
            loss = loss + self.mlm_weight * mlm
            parts["mlm"] = mlm.detach()
        return {"loss": loss, **parts}


def _first(vectors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: x[:rows] for name, x in vectors.items()}


class DistillTask:
    """Trains a student on a corpus.

    Args:
        distiller: teacher and student.
        teacher: the teacher's configuration, for the count of operations.
        sequences: the corpus.
        dev: sequences on which the losses are measured at every checkpoint.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.
    """

    find_unused_parameters = False

    def __init__(
        self,
        distiller: Distiller,
        teacher: Config,
        tokenizer: Tokenizer,
        sequences: PackedSequences,
        dev: Sequence[np.ndarray],
        options: DistillOptions,
        world: World,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        student: Student = distiller.student
        if not options.mlm_weight:
            freeze_untrained(student, distiller.student_layer, [MODULES[name] for name in distiller.names])
        self.module = DistillationModule(distiller, options.mlm_weight)
        self.student = student
        self.configs = (teacher, student.config)
        self.tokenizer = tokenizer
        self.sequences = sequences
        self.dev = dev
        self.options = options
        self.world = world
        self.identity = dict(identity or {})
        self.lengths = sequences.lengths()
        self.order = LengthGroupedBatches(self.lengths, options.per_gpu_train_batch_size, options.seed, 1)

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`."""
        options, distiller = self.options, self.module.distiller
        per_step = self.world.size * options.gradient_accumulation_steps
        return {
            "relations": ",".join(f"{relation.name}:{relation.weight:g}" for relation in distiller.relations),
            "relation_heads": distiller.relation_heads,
            "teacher_layer": distiller.teacher_layer,
            "student_layer": distiller.student_layer,
            "mlm_weight": options.mlm_weight,
            "per_gpu_train_batch_size": options.per_gpu_train_batch_size,
            "gradient_accumulation_steps x processes": per_step,
            **self.identity,
        }

    def step_data(self, step: int) -> StepData:
        """See :class:`minilm_fast.training.task.Task`."""
        options, world = self.options, self.world
        count, size = options.gradient_accumulation_steps, world.size
        numbers = batch_numbers(step, count * size)
        chosen = [self.order[number] for number in numbers]
        lengths = np.concatenate([self.lengths[indices] for indices in chosen])
        mine = zip(numbers[world.rank :: size], chosen[world.rank :: size], strict=True)
        return StepData(
            batches=[self._batch(number, indices) for number, indices in mine],
            normalizer=None,
            tokens=int(lengths.sum()),
            flops=self._flops(lengths),
            state=self.data_state(),
        )

    def _batch(self, number: int, indices: Sequence[int]) -> DistillBatch:
        batch = make_batch([self.sequences[i] for i in indices], self.options.pad_to_multiple_of)
        if self.options.mlm_weight:
            # Drawn anew for every batch by its number, so there is no state to be kept.
            batch = mask_batch(batch, self.tokenizer, np.random.RandomState([self.options.seed % 2**32, number]))
        return batch

    def _flops(self, lengths: np.ndarray) -> float:
        distiller = self.module.distiller
        tokens, pairs = int(lengths.sum()), int((lengths**2).sum())
        total = 0.0
        for config, layer, factor in zip(
            self.configs, (distiller.teacher_layer, distiller.student_layer), (1, 3), strict=True
        ):
            layers = encoder_flops(config, tokens, pairs, layer - 1)
            total += factor * (layers + 2.0 * tokens * len(distiller.names) * config.hidden_size**2)
        teacher, student = (config.hidden_size for config in self.configs)
        # Forward: both sides' scores. Backward: these again, and two products for the student's gradients.
        return total + len(distiller.relations) * pairs * (4.0 * (teacher + student) + 4.0 * student)

    def data_state(self) -> dict[str, Any]:
        """See :class:`minilm_fast.training.task.Task`; the number of a step says all."""
        return {}

    def load_data_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`minilm_fast.training.task.Task`."""

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """The mean losses of a dev sequence, as ``dev_loss`` and ``dev_qk``, ...; no word is masked."""
        if not len(self.dev):
            return {}
        distiller = self.module.distiller
        size = self.options.per_gpu_train_batch_size
        batches = [self.dev[start : start + size] for start in range(0, len(self.dev), size)]
        names = [relation.name for relation in distiller.relations]
        total = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)
        for sequences in batches[world.rank :: world.size]:
            batch = make_batch(sequences, self.options.pad_to_multiple_of).to(world.device)
            inputs, rows = SideInputs(batch.tokens), batch.layout.total
            with torch.no_grad(), precision.autocast():
                teacher, student = distiller.teacher_vectors(inputs), distiller.student_vectors(inputs)
                result = distiller.compare(_first(teacher, rows), _first(student, rows), batch.layout)
            values = torch.stack([result.loss, *(result.relations[name] for name in names)])
            total += values.double() * len(sequences)
        means = (world.sum(total) / len(self.dev)).tolist()
        return {f"dev_{name}": value for name, value in zip(["loss", *names], means, strict=True)}

    def save_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`; a plain Hugging Face model with the teacher's tokenizer."""
        checkpoint.save(
            folder,
            self.student.config,
            self.student.checkpoint_state(),
            self.tokenizer,
            weight_format=self.options.save_format,
        )

    def load_weights(self, folder: Path) -> None:
        """See :class:`minilm_fast.training.task.Task`."""
        loaded = checkpoint.load(folder, for_training=True)
        if self.student.cls is not None and loaded.missing:
            raise UserError(f"cannot resume from {folder}: {loaded.missing[0]} is missing")
        self.student.load_checkpoint_state(loaded.state, f"cannot resume from {folder}")

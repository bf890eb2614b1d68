"""The training steps that ``training.py`` compares: one optimiser step over a batch of pseudo-masked examples each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shapes import ModelShape
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.data.batching import collate
from minilm_fast.data.masking import Sample
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.ops.layout import SequenceLayout
from minilm_fast.training.optimizer import AdamW

SMOOTHING = 0.1


@dataclass(frozen=True)
class TrainJob:
    """What is trained: the model's shape, the longest source and target, dropout, ``fp32``, or ``bf16`` or ``fp16``
    (autocast; the gradients of fp16 are not scaled), and where. ``compiler`` is the backend of torch.compile."""

    shape: ModelShape
    max_source: int
    max_target: int
    dropout: float
    dtype: str
    checkpointing: bool = False
    device: str = "cpu"
    compiler: str = "inductor"

    @property
    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        dtype = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=self.dtype != "fp32")


class Trainer(ABC):
    """A model with random weights and an optimiser."""

    name: str

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.model = self.build()
        self.model.train()
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.model.to(job.device)
        self.optimizer = self.build_optimizer()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return AdamW(self.model.parameters(), lr=1e-5)

    @abstractmethod
    def build(self) -> nn.Module:
        """The network."""

    @abstractmethod
    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """Mean label-smoothed loss of the pseudo tokens, batch preparation included."""

    def settings(self) -> str:
        """How it runs, for the report."""
        return ""

    def step(self, samples: Sequence[Sample]) -> float:
        """Forward, backward, clipping, update; returns the loss."""
        return self.update(samples).item()

    def update(self, samples: Sequence[Sample]) -> Tensor:
        """The step; the loss stays on the device, for which nothing here waits."""
        with self.job.autocast:
            loss = self.loss(samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours(Trainer):
    """minilm_fast: packed."""

    name = "minilm_fast"

    def build(self) -> nn.Module:
        shape = self.job.shape
        config = Config.from_dict(
            {
                "model_type": "bert",
                "vocab_size": shape.vocab,
                "hidden_size": shape.hidden,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "intermediate_size": shape.intermediate,
                "max_position_embeddings": max(shape.positions, self.job.max_source + self.job.max_target),
                "hidden_dropout_prob": self.job.dropout,
                "attention_probs_dropout_prob": self.job.dropout,
            }
        ).replace(label_smoothing=SMOOTHING)
        model = Seq2SeqModel(config)
        model.bert.gradient_checkpointing = self.job.checkpointing
        return model

    def settings(self) -> str:
        return "packed, attention without a mask matrix, fused norm, GELU and loss"

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        return self.model(collate(samples, multiple=64).to(self.job.device))


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """The original's loss: the divergence from a smoothed one-hot matrix, padding rows left out."""
    vocabulary = logits.shape[1]
    target = torch.full_like(logits, SMOOTHING / (vocabulary - 2))
    target[:, 0] = 0
    target.scatter_(1, labels[:, None], 1 - SMOOTHING)
    target.masked_fill_((labels == 0)[:, None], 0)
    losses = F.kl_div(F.log_softmax(logits.float(), dim=1), target, reduction="none").sum(1)
    return losses.sum() / (labels != 0).sum()


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


class _Head(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(shape.vocab))

    def forward(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), matrix, self.bias)


class _SplitLayer(nn.Module):
    """A layer whose attention is one call for each of source, target and pseudo tokens over what may be seen."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        d = shape.hidden
        self.heads = shape.heads
        self.query, self.key, self.value, self.dense = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, shape.intermediate), nn.Linear(shape.intermediate, d)
        self.first, self.second = nn.LayerNorm(d, eps=1e-12), nn.LayerNorm(d, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._heads(query), self._heads(key), self._heads(value)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
        return (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Tensor, parts: Sequence[int]) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        contexts, start = [], 0
        for part in parts:
            end = start + part
            contexts.append(self._attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, :, start:end, :end]))
            start = end
        x = self.first(x + self.dropout(self.dense(torch.cat(contexts, dim=1))))
        return self.second(x + self.dropout(self.down(F.gelu(self.up(x)))))


class _SplitEncoder(nn.Module):
    def __init__(self, job: TrainJob) -> None:
        super().__init__()
        shape = job.shape
        self.word = nn.Embedding(shape.vocab, shape.hidden, padding_idx=0)
        self.position = nn.Embedding(max(shape.positions, job.max_source + job.max_target), shape.hidden)
        self.token_type = nn.Embedding(2, shape.hidden)
        self.norm = nn.LayerNorm(shape.hidden, eps=1e-12)
        self.dropout = nn.Dropout(job.dropout)
        self.layers = nn.ModuleList(_SplitLayer(shape, job.dropout) for _ in range(shape.layers))
        self.head = _Head(shape)


class Original(Trainer):
    """The original's algorithm, written anew: source, target and pseudo tokens each padded to their limits, a dense
    mask, three attention calls a layer, logits and smoothed targets as matrices."""

    name = "original's algorithm"

    def build(self) -> nn.Module:
        return _SplitEncoder(self.job)

    def settings(self) -> str:
        job = self.job
        return f"padded to {job.max_source} + {job.max_target} + {job.max_target}, dense mask, three attention calls"

    def _mask(self, source: Tensor, target: Tensor) -> Tensor:
        """Additive ``[batch, 1, length, length]``, built once a batch."""
        longest, most = self.job.max_source, self.job.max_target
        part = torch.cat([torch.zeros(longest), torch.ones(most), torch.full((most,), 2.0)])
        index = torch.cat([torch.arange(longest), torch.arange(most), torch.arange(most)])
        real = torch.where(part == 0, index < source[:, None], index < target[:, None])
        row, column = index[:, None], index[None, :]
        is_row, is_column = part[:, None], part[None, :]
        seen = (is_column == 0) | ((is_row == 1) & (is_column == 1) & (column <= row))
        seen |= (is_row == 2) & (((is_column == 1) & (column < row)) | ((is_column == 2) & (column == row)))
        return (~(seen & real[:, None, :])).float()[:, None] * -10000.0

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        model, job = self.model, self.job
        parts = (job.max_source, job.max_target, job.max_target)
        fields = [[s.source for s in samples], [s.target for s in samples], [s.pseudo for s in samples]]
        ids = torch.cat([_padded(rows, length) for rows, length in zip(fields, parts, strict=True)], dim=1)
        source = torch.tensor([len(s.source) for s in samples])
        target = torch.tensor([len(s.target) for s in samples])
        after = source[:, None] + torch.arange(job.max_target)
        positions = torch.cat([torch.arange(job.max_source).expand(len(samples), -1), after, after], dim=1)
        types = (torch.arange(sum(parts)) >= job.max_source).long()
        ids, positions, types = (x.to(job.device) for x in (ids, positions, types))
        x = model.word(ids) + model.position(positions) + model.token_type(types)
        x = model.dropout(model.norm(x))
        mask = self._mask(source, target).to(job.device)
        for layer in model.layers:
            x = layer(x, mask, parts)
        logits = model.head(x[:, -job.max_target :], model.word.weight)
        labels = _padded([s.labels for s in samples], job.max_target).flatten()
        return _smoothed(logits.flatten(0, 1), labels.to(job.device))


class HuggingFace(Trainer):
    """``BertForMaskedLM`` with SDPA and a dense mask, padded to the longest sequence of the batch; only the rows that
    predict go through the head."""

    name = "hf"

    def build(self) -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        shape, job = self.job.shape, self.job
        config = BertConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=max(shape.positions, job.max_source + job.max_target),
            hidden_dropout_prob=job.dropout,
            attention_probs_dropout_prob=job.dropout,
            attn_implementation="sdpa",
        )
        return BertForMaskedLM(config)

    def settings(self) -> str:
        import transformers

        return f"transformers {transformers.__version__}, sdpa, dense mask, padded to the longest of the batch"

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        return self.network(*(x.to(self.job.device) for x in self.inputs(samples)))

    def inputs(self, samples: Sequence[Sample]) -> tuple[Tensor, ...]:
        """Of :meth:`network`: ids, positions and token types ``[batch, longest]``, the mask ``[batch, 1, longest,
        longest]``, the places of the rows that predict, and their labels."""
        counts = [(len(s.source), len(s.target), len(s.pseudo)) for s in samples]
        layout = SequenceLayout.from_counts(*zip(*counts, strict=True))
        longest = layout.max_seqlen
        mask = layout.dense_mask()
        # A row that sees nothing would be NaN.
        mask |= torch.eye(longest, dtype=torch.bool)
        positions = [[*range(a + b), *range(a, a + c)] for a, b, c in counts]
        types = [[0] * a + [1] * (b + c) for a, b, c in counts]
        rows = torch.tensor([i * longest + a + b + j for i, (a, b, c) in enumerate(counts) for j in range(c)])
        return (
            _padded([[*s.source, *s.target, *s.pseudo] for s in samples], longest),
            _padded(positions, longest),
            _padded(types, longest),
            mask[:, None],
            rows,
            torch.tensor([label for s in samples for label in s.labels]),
        )

    def network(
        self, ids: Tensor, positions: Tensor, types: Tensor, mask: Tensor, rows: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss."""
        model: Any = self.model
        hidden = model.bert(
            input_ids=ids, position_ids=positions, token_type_ids=types, attention_mask=mask
        ).last_hidden_state
        return _smoothed(model.cls(hidden.flatten(0, 1)[rows]), labels)


class Compiled(HuggingFace):
    """The same with network and loss under ``torch.compile`` and torch's fused optimiser."""

    name = "hf, compiled"

    def build(self) -> nn.Module:
        model = super().build()
        self._compiled = torch.compile(self.network, backend=self.job.compiler)
        return model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        loss: Tensor = self._compiled(*(x.to(self.job.device) for x in self.inputs(samples)))
        return loss


TRAINERS: dict[str, type[Trainer]] = {"ours": Ours, "original": Original, "hf": HuggingFace, "compiled": Compiled}

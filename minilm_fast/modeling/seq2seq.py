"""Masked-LM head, label-smoothed loss and the sequence-to-sequence network trained with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.layouts import (
    DECODER_WEIGHT,
    POSITION_EMBEDDINGS,
    RELATIVE_BIAS,
    WORD_EMBEDDINGS,
    tile_positions,
)
from minilm_fast.modeling.encoder import Encoder, activation

logger = logging.getLogger(__name__)


class _LabelSmoothedCrossEntropy(torch.autograd.Function):
    """Works on a few rows at a time, so that no fp32 copy of all logits exists."""

    ROWS = 16

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        share = smoothing / (logits.shape[1] - 2)
        entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(share) if smoothing else 0.0
        normalisers, losses = [], []
        for chunk, label in zip(
            logits.split(_LabelSmoothedCrossEntropy.ROWS), labels.split(_LabelSmoothedCrossEntropy.ROWS), strict=True
        ):
            rows = chunk.float()
            normaliser = rows.logsumexp(1)
            at_label = rows.gather(1, label[:, None])[:, 0]
            others = rows.sum(1) - at_label - rows[:, 0]
            loss = normaliser - (1 - smoothing) * at_label - share * others + entropy
            losses.append(loss.masked_fill(label == 0, 0.0) if smoothing else loss)
            normalisers.append(normaliser)
        ctx.save_for_backward(logits, labels, torch.cat(normalisers))
        ctx.smoothing = smoothing
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normaliser = ctx.saved_tensors
        smoothing: float = ctx.smoothing
        share = smoothing / (logits.shape[1] - 2)
        if smoothing:
            grad_losses = grad_losses.masked_fill(labels == 0, 0.0)
        grad_logits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], _LabelSmoothedCrossEntropy.ROWS):
            part = slice(start, start + _LabelSmoothedCrossEntropy.ROWS)
            rows = torch.sub(logits[part], normaliser[part, None]).exp_().sub_(share)
            rows[:, 0] += share
            label = labels[part, None]
            rows.scatter_add_(1, label, torch.full_like(label, share - (1 - smoothing), dtype=rows.dtype))
            torch.mul(rows, grad_losses[part, None], out=rows)
            grad_logits[part] = rows
        return grad_logits, None, None


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Loss of each row.

    With ``s = smoothing > 0`` it is ``KL(q || softmax(logits))`` for the target distribution ``q`` with ``1 - s`` at
    the label, 0 at id 0 (padding) and ``s / (V - 2)`` everywhere else; rows whose label is 0 cost nothing. With
    ``s = 0`` it is the cross-entropy, of label 0 too.

    Args:
        logits: ``[rows, V]``, any floating dtype; the sums are taken in fp32.
        labels: int64 ``[rows]``.

    Returns:
        fp32 ``[rows]``.
    """
    return _LabelSmoothedCrossEntropy.apply(logits, labels, smoothing)


class Transform(nn.Module):
    """Dense, activation, LayerNorm before the vocabulary."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(hidden)))


class Predictions(nn.Module):
    """Logits over the vocabulary; the matrix is that of the word embeddings unless the configuration unties it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        matrix = embeddings if self.decoder is None else self.decoder.weight
        return F.linear(self.transform(hidden), matrix, self.bias)


class Head(nn.Module):
    """Holds the predictions under the name that checkpoints use."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class Seq2SeqModel(nn.Module):
    """UniLM-style sequence-to-sequence network: one encoder under a segment mask, a masked-LM head, the loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.cls = Head(config)
        if config.fix_word_embedding:
            self.bert.embeddings.word_embeddings.weight.requires_grad_(False)

    @classmethod
    def from_state(cls, config: Config, state: Mapping[str, Tensor]) -> Seq2SeqModel:
        """Network with the weights of a checkpoint (canonical names).

        A missing masked-LM head is initialised at random, as is a relative-position bias (to zero), and named in a
        warning; position tables shorter than ``config.max_position_embeddings`` repeat cyclically.

        Raises:
            UserError: any other parameter is missing or has another shape.
        """
        model = cls(config)
        model._initialise()
        own = model.state_dict()
        given = {name: tensor for name, tensor in state.items() if name in own}
        positions = given.get(POSITION_EMBEDDINGS)
        if positions is not None and positions.shape[0] < config.max_position_embeddings:
            given[POSITION_EMBEDDINGS] = tile_positions(positions, config.max_position_embeddings)
        missing = sorted(own.keys() - given.keys())
        needed = [n for n in missing if not n.startswith("cls.predictions.") and n != RELATIVE_BIAS]
        if needed:
            raise UserError(f"the checkpoint lacks {len(needed)} weights, the first is {needed[0]}")
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"{name} has shape {list(tensor.shape)} in the checkpoint, {list(own[name].shape)} by the "
                    f"configuration"
                )
        if missing:
            logger.warning("not in the checkpoint, newly initialised: %s", ", ".join(missing))
        model.load_state_dict(given, strict=False)
        return model

    def _initialise(self) -> None:
        transform = self.cls.predictions.transform
        nn.init.normal_(transform.dense.weight, std=self.config.initializer_range)
        nn.init.zeros_(transform.dense.bias)
        if self.bert.rel_pos_bias is not None:
            nn.init.zeros_(self.bert.rel_pos_bias.weight)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Weights under canonical names, the tied decoder included."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        state.setdefault(DECODER_WEIGHT, state[WORD_EMBEDDINGS])
        return state

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., vocab_size]``."""
        return self.cls.predictions(hidden, self.bert.embeddings.word_embeddings.weight)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        predicted: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Loss of a batch: ``sum(loss * weights) / (sum(weights) + 1e-5)``.

        Args:
            input_ids, position_ids: int64 ``[batch, length]``.
            segments: int64 ``[batch, 3]``, numbers of source, target and pseudo tokens.
            predicted: int64 ``[batch, rows]``, the rows that predict ``labels [batch, rows]``.
            weights: fp32 ``[batch, rows]``, 0 where a row is padding.

        Returns:
            fp32 scalar.
        """
        hidden = self.bert(input_ids, position_ids, segments, predicted)
        counted = weights > 0
        row_weights = weights[counted]
        losses = label_smoothed_cross_entropy(
            self.logits(hidden[counted]), labels[counted], self.config.label_smoothing
        )
        return (losses * row_weights).sum() / (row_weights.sum() + 1e-5)

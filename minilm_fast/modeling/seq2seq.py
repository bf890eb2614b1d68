"""Masked-LM head, label-smoothed loss and the sequence-to-sequence network trained with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast import ops
from minilm_fast.config import Config
from minilm_fast.data.batching import PackedBatch
from minilm_fast.errors import UserError
from minilm_fast.layouts import (
    DECODER_WEIGHT,
    POSITION_EMBEDDINGS,
    RELATIVE_BIAS,
    WORD_EMBEDDINGS,
    tile_positions,
)
from minilm_fast.modeling.encoder import Encoder, activated, activation, lm_head_activation

logger = logging.getLogger(__name__)


class Transform(nn.Module):
    """Dense, activation (see :func:`lm_head_activation`), LayerNorm before the vocabulary."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        name = lm_head_activation(config)
        self.activation = None if name == "gelu" else activation(name)
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        norm = self.LayerNorm
        x = activated(self.dense, self.activation, hidden)
        return ops.dropout_add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)


class Predictions(nn.Module):
    """Logits over the vocabulary; the matrix is that of the word embeddings unless the configuration unties it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.embedding_size, config.vocab_size, bias=False)

    def matrix(self, embeddings: Tensor) -> Tensor:
        """The output projection ``[vocab_size, hidden]``, given the word embeddings."""
        return embeddings if self.decoder is None else self.decoder.weight


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
        """``[rows, hidden]`` -> ``[rows, vocab_size]``."""
        head = self.cls.predictions
        return F.linear(head.transform(hidden), head.matrix(self.bert.embeddings.word_embeddings.weight), head.bias)

    def losses(self, batch: PackedBatch) -> Tensor:
        """Loss of each predicted token: fp32 ``[rows]``."""
        hidden = self.bert(batch.input_ids, batch.position_ids, batch.layout)
        head = self.cls.predictions
        return ops.label_smoothed_cross_entropy(
            head.transform(hidden[batch.predicted]),
            head.matrix(self.bert.embeddings.word_embeddings.weight),
            head.bias,
            batch.labels,
            self.config.label_smoothing,
        )

    def forward(self, batch: PackedBatch, normalizer: float | Tensor | None = None) -> Tensor:
        """Loss of a batch: the weighted sum of the tokens' losses over ``normalizer``.

        Args:
            normalizer: by default ``sum(batch.weights) + 1e-5``, as in the original.

        Returns:
            fp32 scalar.
        """
        if normalizer is None:
            normalizer = batch.weights.sum() + 1e-5
        return (self.losses(batch) * batch.weights).sum() / normalizer

"""Self-attention vectors of one layer, from whatever kind of model stands on a side of the distillation.

A side computes the layers before the distilled one and of that layer nothing but the vectors that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import Encoder

MODULES = {"q": "query", "k": "key", "v": "value"}

# A packed batch, or Hugging Face's ``input_ids``, ``attention_mask`` and maybe ``token_type_ids``, each
# ``[batch, length]``.
Inputs = TokenBatch | Mapping[str, Tensor]


class Side(Protocol):
    """One model of the two.

    Attributes:
        layers, heads, hidden_size, vocab_size: its sizes.
    """

    layers: int
    heads: int
    hidden_size: int
    vocab_size: int

    def vectors(self, inputs: SideInputs, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Queries, keys or values ``[tokens, hidden_size]`` of layer ``layer`` (from 1), by letter."""


@dataclass
class SideInputs:
    """One batch in the form that each side wants; converted when first asked for.

    Attributes:
        layout: of the packed tokens.
    """

    given: Inputs

    def __post_init__(self) -> None:
        if isinstance(self.given, TokenBatch):
            self._packed = self.given
        else:
            ids = self.given["input_ids"]
            mask = self.given.get("attention_mask")
            self._packed = TokenBatch.from_padded(ids, torch.ones_like(ids) if mask is None else mask)
        self.layout = self._packed.layout

    def packed(self) -> TokenBatch:
        """The packed batch.

        Raises:
            ValueError: the padded one has token types, which a packed batch does not carry.
        """
        if not isinstance(self.given, TokenBatch):
            types = self.given.get("token_type_ids")
            if types is not None and bool(types.any()):
                raise ValueError("token_type_ids other than 0 need a Hugging Face model on both sides")
        return self._packed

    def padded(self, pad_id: int) -> dict[str, Tensor]:
        """Arguments of a Hugging Face model."""
        if not isinstance(self.given, TokenBatch):
            return dict(self.given)
        ids, mask = self.given.padded(pad_id)
        return {"input_ids": ids, "attention_mask": mask}


def project(attention: nn.Module, hidden: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The vectors ``[tokens, hidden_size]`` that a self-attention module projects ``hidden`` to, as one product."""
    layers = [getattr(attention, MODULES[name]) for name in names]
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return dict(zip(names, F.linear(hidden, weight, bias).chunk(len(names), dim=1), strict=True))


class EncoderSide:
    """Our packed encoder."""

    def __init__(self, encoder: Encoder) -> None:
        config = encoder.config
        self.encoder = encoder
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size

    def vectors(self, inputs: SideInputs, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`Side`."""
        batch = inputs.packed()
        states = self.encoder.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
        return self.vectors_of(next(islice(states, layer - 1, None)), layer, names)

    def vectors_of(self, hidden: Tensor, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The vectors, given the layer's input ``[tokens, hidden_size]``."""
        module: Any = self.encoder.encoder.layer[layer - 1]
        return project(module.attention.self, hidden, names)


class HuggingFaceSide:
    """A ``transformers`` model with BERT's modules: BERT, RoBERTa, XLM-R, ELECTRA and what is built like them.

    Args:
        model: with or without a head.

    Raises:
        UserError: its modules are others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base: Any = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
        config: Any = model.config
        try:
            first = self.base.encoder.layer[0].attention.self
            known = all(isinstance(getattr(first, name), nn.Linear) for name in MODULES.values())
        except (AttributeError, IndexError, TypeError):
            known = False
        if not known:
            raise UserError(f"{type(model).__name__}: not a model with BERT's encoder (BERT, RoBERTa, XLM-R, ELECTRA)")
        self.layers, self.heads = len(self.base.encoder.layer), config.num_attention_heads
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.pad_id = config.pad_token_id or 0

    def vectors(self, inputs: SideInputs, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """See :class:`Side`."""
        attention = self.base.encoder.layer[layer - 1].attention.self
        arguments = inputs.padded(self.pad_id)
        with _first_layers(self.base.encoder, layer - 1):
            hidden = self.base(**arguments)[0]
        mask = arguments.get("attention_mask")
        return project(attention, hidden.flatten(0, 1) if mask is None else hidden[mask.bool()], names)


@contextmanager
def _first_layers(encoder: Any, count: int) -> Iterator[None]:
    """Within the block the encoder ends after so many layers."""
    layers = encoder.layer
    encoder.layer = layers[:count]
    try:
        yield
    finally:
        encoder.layer = layers


def make_side(model: Any) -> Side:
    """The side for a model: ours, one from ``transformers``, or something that is a :class:`Side` already.

    Raises:
        UserError: none of these.
    """
    if callable(getattr(model, "vectors", None)):
        return model
    encoder = model if isinstance(model, Encoder) else getattr(model, "bert", None)
    if isinstance(encoder, Encoder):
        return EncoderSide(encoder)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return HuggingFaceSide(model)
    raise UserError(f"{type(model).__name__} is neither an encoder of ours nor a Hugging Face model")

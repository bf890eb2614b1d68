"""An encoder with a classifier of whole sequences; names of Hugging Face's ``...ForSequenceClassification``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm_fast.config import ROBERTA_TYPES, Config
from minilm_fast.data.glue import ClassificationFeature
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import Encoder

# The two linear layers of the head by family.
_BERT_NAMES = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
_OTHER_NAMES = {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}


@dataclass(frozen=True)
class ClassificationBatch:
    """Packed sequences, their token types int32 ``[tokens]`` and their labels int64 ``[batch]``."""

    tokens: TokenBatch
    token_type_ids: Tensor
    labels: Tensor

    @classmethod
    def collate(cls, features: Sequence[ClassificationFeature]) -> ClassificationBatch:
        """Packs features."""
        types = torch.tensor([kind for feature in features for kind in feature.token_type_ids], dtype=torch.int32)
        labels = torch.tensor([feature.label for feature in features])
        return cls(TokenBatch.from_sequences([feature.input_ids for feature in features]), types, labels)

    def to(self, device: torch.device | str) -> ClassificationBatch:
        """The same batch on a device."""
        types, labels = (x.to(device, non_blocking=True) for x in (self.token_type_ids, self.labels))
        return replace(self, tokens=self.tokens.to(device), token_type_ids=types, labels=labels)


class SequenceClassifier(nn.Module):
    """Dense layer and activation on the first token, dropout, linear classifier.

    The activation is tanh, for ELECTRA GELU. RoBERTa and ELECTRA also drop out what enters the dense layer.

    Args:
        config: its token types are those of the sequences' two parts.
        num_labels: of the classifier.
    """

    def __init__(self, config: Config, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        for layer in (self.pooler, self.classifier):
            nn.init.normal_(layer.weight, std=config.initializer_range)
            nn.init.zeros_(layer.bias)
        self._bert_like = config.model_type not in (*ROBERTA_TYPES, "electra")

    @classmethod
    def from_state(cls, config: Config, state: Mapping[str, Tensor], num_labels: int) -> SequenceClassifier:
        """Network with the encoder of a checkpoint, and its pooler and classifier where they fit.

        Args:
            state: canonical names; pooler and classifier as on disk.

        Raises:
            UserError: a weight of the encoder is missing or has another shape.
        """
        model = cls(config, num_labels)
        own = model.state_dict()
        disk = model.disk_names()
        given = {name: state[disk.get(name, name)] for name in own if disk.get(name, name) in state}
        for name, tensor in own.items():
            if name in given and given[name].shape == tensor.shape:
                continue
            if name.startswith("bert."):
                raise UserError(f"the checkpoint has no {name} of shape {list(tensor.shape)}")
            given.pop(name, None)
        model.load_state_dict(given, strict=False)
        return model

    def disk_names(self) -> dict[str, str]:
        """Names of the head's parameters in a checkpoint."""
        names = _BERT_NAMES if self._bert_like else _OTHER_NAMES
        return {f"{own}.{kind}": f"{disk}.{kind}" for own, disk in names.items() for kind in ("weight", "bias")}

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Weights under canonical names, those of the head as on disk."""
        disk = self.disk_names()
        return {disk.get(name, name): tensor.detach() for name, tensor in self.state_dict().items()}

    def forward(self, batch: ClassificationBatch) -> Tensor:
        """Logits ``[batch, num_labels]``."""
        tokens = batch.tokens
        hidden = self.bert(tokens.input_ids, tokens.position_ids, tokens.layout, batch.token_type_ids)
        first = hidden[tokens.layout.cu_seqlens[:-1].long()]
        pooled = self.pooler(first if self._bert_like else self.dropout(first))
        pooled = F.gelu(pooled) if self.config.model_type == "electra" else torch.tanh(pooled)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits

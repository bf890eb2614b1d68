"""What all heads have in common: loading, saving, and taking packed or padded input.

A head's parameters carry the names that they have on disk, with the encoder below ``bert.``, so that a ``state_dict``
is a checkpoint's state under canonical names.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import Encoder, initialise
from minilm_fast.modeling.heads.inputs import HeadInput
from minilm_fast.modeling.heads.labels import label_names, with_labels
from minilm_fast.ops import forced_backend
from minilm_fast.tokenization import Tokenizer

if TYPE_CHECKING:
    from minilm_fast.modeling.heads.packed import PackedHead

logger = logging.getLogger(__name__)

_PREFIXES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "electra": "Electra"}
BERT_TYPES = ("bert", "minilm", "unilm")
_H = TypeVar("_H", bound="HeadModel")


class HeadModel(nn.Module):
    """An encoder with a head; a new one is initialised as BERT's are (normal, ``config.initializer_range``).

    Attributes:
        config: of the encoder; the labels are in ``config.extra`` under their names of ``config.json``.
        tokenizer: of the checkpoint, read when it is first asked for; may be set.
        newly_initialised: parameters of the head that a checkpoint did not have.
    """

    suffix: ClassVar[str]
    """What the name of the class in transformers ends with."""
    labelled: ClassVar[bool] = True
    """Whether ``num_labels`` is free to choose."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """The families whose checkpoints may have this head; empty: all."""
    causal: ClassVar[bool] = False
    """Whether a token sees itself and those before it only, ``is_decoder`` of transformers' configurations."""
    reads_first_token: ClassVar[bool] = False
    """Whether :meth:`head` takes the first token of each sequence only; the last layer is computed for it alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._check(config)
        self.config = with_labels(config) if self.labelled else config
        self.newly_initialised: list[str] = []
        self._tokenizer: Tokenizer | Callable[[], Tokenizer] = _no_tokenizer
        self._packed: tuple[object, PackedHead] | None = None
        self.bert = Encoder(config)
        self.build(self.config)
        initialise(self, config.initializer_range)

    @classmethod
    def _check(cls, config: Config) -> None:
        if cls.model_types and config.model_type not in cls.model_types:
            raise UserError(f"{cls.__name__} is a head of {', '.join(cls.model_types)}, not of {config.model_type}")
        if config.extra.get("is_decoder") and not cls.causal:
            raise UserError(f"configuration: is_decoder is set, and {cls.__name__} is bidirectional; load CausalLM")

    @abstractmethod
    def build(self, config: Config) -> None:
        """Adds the modules of the head."""

    @property
    def labels(self) -> list[str]:
        """Names of the labels in the order of the logits."""
        return label_names(self.config)

    @classmethod
    def from_pretrained(
        cls: type[_H],
        name_or_path: str | Path,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        problem_type: str | None = None,
        config_name: str | None = None,
        tokenizer_name: str | None = None,
        model_type: str | None = None,
        do_lower_case: bool | None = None,
        cache_dir: str | None = None,
    ) -> _H:
        """Loads an encoder with its head; a head that the checkpoint lacks starts afresh and is named in a warning.

        Args:
            name_or_path: a folder, a hub id, or a weights file (then with ``config_name``).
            num_labels: by default what the configuration says. Where it is another number than the checkpoint's, the
                classifier starts afresh.
            label_names: names of the labels, in place of ``num_labels``.
            problem_type: ``regression``, ``single_label_classification`` or ``multi_label_classification``.
            config_name: configuration, if it is not beside the weights.
            tokenizer_name: vocabulary file, folder or hub id, if it is not beside the weights.
            model_type: the family, where neither names nor configuration tell.
            do_lower_case: for WordPiece vocabularies; by default what the checkpoint records, else False.
            cache_dir: where downloads from the hub are kept.

        Raises:
            UserError: a part of the encoder is missing, or something does not fit together.
        """
        found = checkpoint.resolve(
            name_or_path, config_name=config_name, tokenizer_name=tokenizer_name, cache_dir=cache_dir
        )
        loaded = checkpoint.load(
            found.weights, config=found.config, model_type=model_type, for_training=True, fold_token_types=True
        )
        state = {**loaded.state, **loaded.extra_state}
        try:
            model = cls.from_state(
                loaded.config, state, num_labels=num_labels, label_names=label_names, problem_type=problem_type
            )
        except UserError as error:
            raise UserError(f"{loaded.path}: {error}") from None
        if found.tokenizer is not None:
            record = loaded.tokenizer_record
            model._tokenizer = partial(_tokenizer, found.tokenizer, model.config, record, do_lower_case, cache_dir)
        return model

    @classmethod
    def from_state(
        cls: type[_H],
        config: Config,
        state: Mapping[str, Tensor],
        num_labels: int | None = None,
        *,
        label_names: Sequence[str] | None = None,
        problem_type: str | None = None,
    ) -> _H:
        """A network with the weights of a checkpoint.

        Args:
            state: canonical names, the head as on disk.

        The other arguments and the errors are those of :meth:`from_pretrained`.
        """
        chosen = num_labels is not None or label_names is not None
        if chosen or problem_type is not None:
            if not cls.labelled:
                raise UserError(f"{cls.__name__} has no labels to choose")
            config = with_labels(config, num_labels=num_labels, names=label_names, problem_type=problem_type)
        model = cls(config)
        own = model.state_dict()
        given = {name: state[name] for name in own if name in state}
        for name, tensor in given.items():
            if tensor.is_floating_point():
                checkpoint.check_finite(name, tensor)
        for name, tensor in own.items():
            if name in given and given[name].shape == tensor.shape:
                continue
            found = list(given.pop(name).shape) if name in given else None
            if name.startswith("bert.") and not name.startswith("bert.pooler."):
                raise UserError(
                    f"the checkpoint has no {name} of shape {list(tensor.shape)}"
                    + (f" but one of {found}" if found else "")
                )
            if found is not None and not chosen:
                raise UserError(
                    f"{name} has shape {found} in the checkpoint, {list(tensor.shape)} by the configuration; give "
                    f"num_labels to start afresh"
                )
            model.newly_initialised.append(name)
        if model.newly_initialised:
            logger.warning("not in the checkpoint, newly initialised: %s", ", ".join(model.newly_initialised))
        model.load_state_dict(given, strict=False)
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """See the class.

        Raises:
            UserError: the checkpoint came without one, or its files are not of this model.
        """
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def packed(self, dtype: str = "fp32") -> PackedHead:
        """The present weights packed for inference; kept, and made anew after they have changed or moved.

        Args:
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"``.

        Raises:
            UserError: as :class:`minilm_fast.modeling.heads.packed.PackedHead`.
        """
        from minilm_fast.modeling.heads.packed import PackedHead

        key = (dtype, forced_backend(), [(p.data_ptr(), p._version) for p in self.parameters()])
        if self._packed is None or self._packed[0] != key:
            self._packed = None
            self._packed = key, PackedHead(self, dtype)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its own weights.
        return {**self.__dict__, "_packed": None}

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Weights under canonical names, the head as on disk."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @property
    def architecture(self) -> str:
        """The class of transformers that loads what :meth:`save_pretrained` writes."""
        return _PREFIXES.get(self.config.model_type, "Bert") + self.suffix

    def save_pretrained(
        self, folder: str | Path, tokenizer: Tokenizer | None = None, *, weight_format: str = "safetensors"
    ) -> None:
        """Writes a checkpoint that transformers' class of the same purpose loads with equal logits.

        Args:
            folder: created if need be; each file appears whole or not at all.
            tokenizer: its files are written beside the weights.
            weight_format: ``"safetensors"``, ``"bin"`` or ``"both"``.

        Raises:
            UserError: the folder cannot be written.
        """
        checkpoint.save(
            folder,
            self.config,
            self.checkpoint_state(),
            tokenizer,
            weight_format=weight_format,
            architecture=self.architecture,
        )

    def forward(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        encode: Callable[[HeadInput], Tensor] | None = None,
    ) -> Any:
        """Logits: a tensor, of :class:`PreTraining` two.

        Args:
            input_ids: a packed batch, or ids ``[batch, length]``.
            attention_mask, token_type_ids, position_ids: of a padded batch, see :meth:`HeadInput.from_padded`; a packed
                one takes ``token_type_ids`` int32 ``[tokens]`` only.
            encode: stands in for :meth:`encode`.

        Raises:
            UserError: the arguments do not fit one another or the model.
        """
        batch = self.read(input_ids, attention_mask, token_type_ids, position_ids)
        return self.head((encode or self.encode)(batch), batch)

    def read(
        self,
        input_ids: Tensor | TokenBatch,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> HeadInput:
        """The arguments of :meth:`forward`, packed; where only first tokens are read, these alone ask."""
        if isinstance(input_ids, TokenBatch):
            if attention_mask is not None or position_ids is not None:
                raise UserError("a packed batch has its own positions and no attention_mask")
            batch = HeadInput.from_packed(self.config, input_ids, token_type_ids)
        else:
            batch = HeadInput.from_padded(self.config, input_ids, attention_mask, token_type_ids, position_ids)
        return batch.first_asks() if self.reads_first_token else batch

    def encode(self, batch: HeadInput) -> Tensor:
        """The encoder's output ``[layout.total_queries, hidden]``: of all tokens, or of the first of each sequence."""
        tokens = batch.tokens
        return self.bert(tokens.input_ids, tokens.position_ids, tokens.layout, batch.token_type_ids)

    @abstractmethod
    def head(self, hidden: Tensor, batch: HeadInput) -> Any:
        """Logits from the encoder's output ``[layout.total_queries, hidden]``."""


def _no_tokenizer() -> Tokenizer:
    raise UserError("the model has no tokenizer: give tokenizer_name, or set it")


def _tokenizer(
    path: str, config: Config, record: Mapping[str, Any] | None, do_lower_case: bool | None, cache_dir: str | None
) -> Tokenizer:
    if do_lower_case is None and record is not None:
        do_lower_case = record.get("do_lower_case")
    found = Tokenizer.from_pretrained(
        path, model_type=config.model_type, do_lower_case=do_lower_case, cache_dir=cache_dir
    )
    checkpoint.check_tokenizer(config, record, found)
    return found


class Pooler(nn.Module):
    """Dense layer and tanh on the first token (``bert.pooler``)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """``[batch, hidden]`` -> the same shape."""
        return torch.tanh(self.dense(first))


def dropout_setting(config: Config, key: str, default: float) -> float:
    """A dropout probability in ``config.json`` that only some heads read.

    Raises:
        UserError: it is not at least 0 and below 1.
    """
    value: Any = config.extra.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"configuration: {key} must be at least 0 and below 1, found {value!r}")
    return float(value)


def classifier_dropout(config: Config) -> nn.Dropout:
    """``classifier_dropout``, by default that of the hidden states."""
    return nn.Dropout(dropout_setting(config, "classifier_dropout", config.hidden_dropout_prob))

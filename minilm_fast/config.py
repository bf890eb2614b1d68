"""Model configuration: what a ``config.json`` says, validated, with the differences between families resolved."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atomic import atomic_write
from .errors import UserError

MODEL_TYPES = ("bert", "minilm", "unilm", "roberta", "xlm-roberta", "electra")
ROBERTA_TYPES = ("roberta", "xlm-roberta")
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")

_ACTIVATION_ALIASES = {"swish": "silu", "gelu_python": "gelu"}
# Families whose Hugging Face architecture is BERT's; their own name is kept in our section of the file.
_BERT_LIKE_TYPES = ("minilm", "unilm")
_SECTION = "minilm_fast"


@dataclass(frozen=True)
class Config:
    """Sizes and settings of one Transformer, in canonical terms.

    The fields carry Hugging Face's names, with two differences that :meth:`from_dict` and :meth:`to_dict` undo:
    for RoBERTa and XLM-R ``max_position_embeddings`` counts usable positions (the ``pad_token_id + 1`` rows that
    those families never read are not counted), and ``type_vocab_size == 0`` means that no token-type embedding is
    added.

    Args:
        vocab_size: rows of the word embedding.
        hidden_size: width of the hidden states; a multiple of ``num_attention_heads``.
        embedding_size: width of the embeddings; 0 stands for ``hidden_size``. It differs for ELECTRA only.
        layer_norm_eps: epsilon of every LayerNorm.
        hidden_act: one of ``ACTIVATIONS``; ``gelu`` is the erf form.
        rel_pos_bins: buckets of the relative-position bias of UniLM v2; 0 means none.
        max_rel_pos: distance at which its buckets stop growing.
        source_type_id, target_type_id: token types of source and target in sequence-to-sequence use.
        label_smoothing, fix_word_embedding: fine-tuning settings that the original keeps in the file.
        tie_word_embeddings: whether the output projection is the word embedding.
        extra: every other key of the file, kept so that writing it again loses nothing.

    Raises:
        UserError: a value has the wrong type, is out of range or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    embedding_size: int = 0
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    rel_pos_bins: int = 0
    max_rel_pos: int = 0
    source_type_id: int = 0
    target_type_id: int = 1
    model_type: str = "bert"
    label_smoothing: float = 0.0
    fix_word_embedding: bool = False
    tie_word_embeddings: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.embedding_size == 0 and isinstance(self.hidden_size, int):
            object.__setattr__(self, "embedding_size", self.hidden_size)
        if isinstance(self.hidden_act, str):
            object.__setattr__(self, "hidden_act", _ACTIVATION_ALIASES.get(self.hidden_act, self.hidden_act))
        self._validate("configuration")

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, validated again."""
        if "hidden_size" in changes and self.embedding_size == self.hidden_size:
            changes.setdefault("embedding_size", 0)
        return dataclasses.replace(self, **changes)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_offset(self) -> int:
        """Rows before the first usable position in this family's table on disk (RoBERTa and XLM-R: 2)."""
        return self.pad_token_id + 1 if self.model_type in ROBERTA_TYPES else 0

    @property
    def stored_type_vocab_size(self) -> int:
        """Rows of the token-type table on disk, where no family can have fewer than it indexes."""
        if self.type_vocab_size:
            return self.type_vocab_size
        return 1 if self.model_type in ROBERTA_TYPES else max(self.source_type_id, self.target_type_id) + 1

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, model_type: str | None = None, source: str = "configuration"
    ) -> Config:
        """Build a configuration from the keys of a ``config.json``.

        Args:
            values: the parsed file.
            model_type: the family that the weights turned out to be of; it decides whether positions are offset
                and whether there are token types. By default the file's own ``model_type``, else ``bert``.
            source: what error messages call the place the values come from.

        Raises:
            UserError: naming ``source`` and the key.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: expected a JSON object, found {type(values).__name__}")
        rest = {key: value for key, value in values.items() if value is not None or key not in _FIELDS}
        section = rest.pop(_SECTION, {})
        if not isinstance(section, Mapping):
            raise UserError(f"{source}: {_SECTION} must be an object")
        rest["model_type"] = model_type or section.get("model_type") or values.get("model_type") or "bert"
        fields: dict[str, Any] = {key: rest.pop(key) for key in list(rest) if key in _FIELDS}
        for key in _REQUIRED:
            if key not in fields:
                raise UserError(f"{source}: {key} is missing")
        if rest.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"{source}: position_embedding_type {rest['position_embedding_type']!r} is not supported")
        _check_types(fields, source)
        _to_canonical(fields, section)
        own = {key: value for key, value in section.items() if key not in ("model_type", "no_token_types")}
        try:
            return cls(**fields, extra={**rest, **({_SECTION: own} if own else {})})
        except UserError as error:
            raise UserError(str(error).replace("configuration:", f"{source}:", 1)) from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, model_type: str | None = None) -> Config:
        """Read a ``config.json``, or the one in a folder.

        Raises:
            UserError: the file is missing, is not JSON, or holds a wrong value.
        """
        return cls.from_dict(read_json(path), model_type=model_type, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a ``config.json`` that plain transformers understands.

        What Hugging Face's configuration cannot express (the names ``minilm`` and ``unilm``, BERT without token
        types) goes into a section named ``minilm_fast`` and comes back through :meth:`from_dict`.
        """
        result: dict[str, Any] = {key: value for key, value in self.extra.items() if key != _SECTION}
        result.update({name: getattr(self, name) for name in _FIELDS})
        section = dict(self.extra.get(_SECTION, {}))
        if self.model_type in _BERT_LIKE_TYPES:
            section["model_type"] = self.model_type
            result["model_type"] = "bert"
        if self.type_vocab_size == 0 and self.model_type not in ROBERTA_TYPES:
            section["no_token_types"] = True
        result["max_position_embeddings"] += self.position_offset
        result["type_vocab_size"] = self.stored_type_vocab_size
        if section:
            result[_SECTION] = section
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``config.json`` atomically; ``path`` is the file, or a folder to put it in.

        Raises:
            UserError: the place cannot be written.
        """
        target = Path(path)
        if target.is_dir():
            target = target / "config.json"
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        with atomic_write(target) as stream:
            stream.write(text.encode())

    def _validate(self, source: str) -> None:
        _check_types({name: getattr(self, name) for name in _FIELDS}, source)
        for name, (holds, condition) in _RANGES.items():
            if not holds(getattr(self, name)):
                raise UserError(f"{source}: {name} must be {condition}, found {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"{source}: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.model_type not in MODEL_TYPES:
            raise UserError(
                f"{source}: model_type {self.model_type!r} is not supported (known: {', '.join(MODEL_TYPES)})"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{source}: hidden_act {self.hidden_act!r} is not supported (known: {', '.join(ACTIVATIONS)})"
            )
        if self.embedding_size != self.hidden_size and self.model_type != "electra":
            raise UserError(
                f"{source}: embedding_size {self.embedding_size} differs from hidden_size {self.hidden_size}, "
                f"which only electra allows"
            )
        if self.rel_pos_bins and not self.max_rel_pos:
            raise UserError(f"{source}: rel_pos_bins {self.rel_pos_bins} needs a max_rel_pos above 0")
        if self.pad_token_id >= self.vocab_size:
            raise UserError(f"{source}: pad_token_id {self.pad_token_id} is outside vocab_size {self.vocab_size}")
        self._check_type_ids(source)

    def _check_type_ids(self, source: str) -> None:
        # A table of one row has no second type: it can only be the encoder's.
        if self.type_vocab_size == 1 and self.target_type_id == 1 and self.source_type_id == 0:
            object.__setattr__(self, "target_type_id", 0)
        for name in ("source_type_id", "target_type_id"):
            if self.type_vocab_size and getattr(self, name) >= self.type_vocab_size:
                raise UserError(
                    f"{source}: {name} {getattr(self, name)} is outside type_vocab_size {self.type_vocab_size}"
                )


_FIELDS = {spec.name: spec for spec in dataclasses.fields(Config) if spec.name != "extra"}
_REQUIRED = tuple(name for name, spec in _FIELDS.items() if spec.default is dataclasses.MISSING)
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "positive")
_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "zero or positive")
_FRACTION: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_RANGES = {
    **dict.fromkeys((*_REQUIRED, "embedding_size", "layer_norm_eps"), _POSITIVE),
    # Limits far above any model, so that a slip of the keyboard is an error and not all the memory.
    "num_hidden_layers": (lambda value: 0 < value <= 1000, "from 1 to 1000"),
    "max_position_embeddings": (lambda value: 0 < value <= 1 << 20, "positive and at most 1048576"),
    **dict.fromkeys(("type_vocab_size", "initializer_range", "pad_token_id", "rel_pos_bins"), _NOT_NEGATIVE),
    **dict.fromkeys(("max_rel_pos", "source_type_id", "target_type_id"), _NOT_NEGATIVE),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "label_smoothing"), _FRACTION),
}


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file, or from ``config.json`` in a folder.

    Raises:
        UserError: the file is missing, empty, a web page, broken JSON or not an object; naming file and line.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a JSON file (it is not UTF-8 text)") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    if text.lstrip().startswith("<"):
        raise UserError(f"{file}: a web page (HTML) where JSON was expected; download the file again")
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{file}: line {line}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _check_types(fields: Mapping[str, Any], source: str) -> None:
    for name, value in fields.items():
        expected = _TYPES[str(_FIELDS[name].type)]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise UserError(f"{source}: {name} must be of type {_FIELDS[name].type}, found {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {name} must be finite, found {value!r}")


def _to_canonical(fields: dict[str, Any], section: Mapping[str, Any]) -> None:
    if fields["model_type"] in ROBERTA_TYPES:
        fields.setdefault("pad_token_id", 1)
        offset = fields["pad_token_id"] + 1
        fields["max_position_embeddings"] = fields.get("max_position_embeddings", 512 + offset) - offset
        fields["type_vocab_size"] = 0
    elif section.get("no_token_types"):
        fields["type_vocab_size"] = 0

"""The names and shapes that checkpoints of the BERT family have on disk, and the one canonical form they become.

Canonical names are those of Hugging Face's ``BertForMaskedLM``, with ``bert.embeddings_project.{weight,bias}``
(ELECTRA, when the embeddings are narrower than the hidden states) and ``bert.rel_pos_bias.weight [heads, bins]``
(UniLM v2) added. The output projection is ``cls.predictions.decoder.weight [vocab_size, embedding_size]`` and its
bias ``cls.predictions.bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import ROBERTA_TYPES, Config

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
POSITION_EMBEDDINGS = "bert.embeddings.position_embeddings.weight"
TOKEN_TYPE_EMBEDDINGS = "bert.embeddings.token_type_embeddings.weight"
RELATIVE_BIAS = "bert.rel_pos_bias.weight"
DECODER_WEIGHT = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.bias"

_FAMILY_TYPES = {
    "bert": ("bert", "minilm", "unilm"),
    "roberta": ROBERTA_TYPES,
    "electra": ("electra",),
}
# Prefixes of canonical names -> prefixes on disk. The first that matches counts.
_HEAD_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "bert": (),
    "roberta": (
        ("cls.predictions.transform.dense.", "lm_head.dense."),
        ("cls.predictions.transform.LayerNorm.", "lm_head.layer_norm."),
        ("cls.predictions.decoder.", "lm_head.decoder."),
        ("cls.predictions.bias", "lm_head.bias"),
    ),
    "electra": (
        ("cls.predictions.transform.", "generator_predictions."),
        ("cls.predictions.decoder.", "generator_lm_head."),
        ("cls.predictions.bias", "generator_lm_head.bias"),
    ),
}
_TRAINING_WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class CanonicalState:
    """A checkpoint under canonical names.

    Args:
        tensors: every tensor of the file, renamed; what no rule knows keeps its name.
        origins: canonical name -> name in the file, where they differ.
        family: ``bert``, ``roberta`` or ``electra``.
        layout: the same with what is special about the file, such as ``bert-bare`` or ``bert-fused-qkv``.
    """

    tensors: dict[str, Tensor]
    origins: dict[str, str] = field(default_factory=dict)
    family: str = "bert"
    layout: str = "bert"

    def rename(self, old: str, new: str) -> None:
        """Move a tensor to another name."""
        self.put(new, self.tensors.pop(old), self.origins.pop(old, old))

    def put(self, name: str, tensor: Tensor, origin: str) -> None:
        """Add a tensor that comes from ``origin``."""
        self.tensors[name] = tensor
        if origin != name:
            self.origins[name] = origin

    def describe(self, name: str) -> str:
        """``name``, with the file's own name for it where that differs."""
        origin = self.origins.get(name, name)
        return name if origin == name else f"{name} ({origin} in the file)"


def model_type_of(family: str, *candidates: object) -> str:
    """The first candidate that names a member of the family, else the family's own name."""
    known = _FAMILY_TYPES[family]
    return next((str(candidate) for candidate in candidates if candidate in known), known[0])


def canonicalize(tensors: Mapping[str, Tensor], model_type: str | None = None) -> CanonicalState | None:
    """Bring a state dict of any known layout to canonical names. Values are not changed, but for fused tensors.

    Args:
        tensors: as read from the file.
        model_type: the configuration's family, which settles files whose names carry no prefix.

    Returns:
        ``None`` if no layout matches.
    """
    state = CanonicalState({})
    for name, tensor in tensors.items():
        state.put(_plain_name(name), tensor, name)
    prefix = next((prefix for prefix in ("bert", "roberta", "electra") if _has_encoder(state, prefix)), None)
    if prefix is None and "embeddings.word_embeddings.weight" not in state.tensors:
        return None
    family = prefix or next((key for key, types in _FAMILY_TYPES.items() if model_type in types), "bert")
    state.family, state.layout = family, family if prefix else f"{family}-bare"
    for name in list(state.tensors):
        new = _canonical_name(name, family, bare=prefix is None)
        if new != name:
            state.rename(name, new)
    _unify_decoder(state)
    if _split_fused_qkv(state):
        state.layout += "-fused-qkv"
    return state


def _has_encoder(state: CanonicalState, prefix: str) -> bool:
    return any(name.startswith((f"{prefix}.embeddings.", f"{prefix}.encoder.")) for name in state.tensors)


def _plain_name(name: str) -> str:
    for wrapper in _TRAINING_WRAPPERS:
        name = name.removeprefix(wrapper)
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _canonical_name(name: str, family: str, *, bare: bool) -> str:
    if bare and name.startswith(("embeddings.", "encoder.", "pooler.", "embeddings_project.", "rel_pos_bias.")):
        name = f"bert.{name}"
    elif name.startswith(f"{family}."):
        name = "bert." + name.removeprefix(f"{family}.")
    for canonical, on_disk in reversed(_HEAD_PREFIXES[family]):
        if name.startswith(on_disk):
            return canonical + name.removeprefix(on_disk)
    return {
        "cls.predictions.decoder_weight": DECODER_WEIGHT,
        "bert.encoder.rel_pos_bias.weight": RELATIVE_BIAS,
    }.get(name, name)


def _unify_decoder(state: CanonicalState) -> None:
    """Old files have only one of the two names of the output bias."""
    alias = "cls.predictions.decoder.bias"
    if alias in state.tensors and DECODER_BIAS not in state.tensors:
        state.rename(alias, DECODER_BIAS)


def _split_fused_qkv(state: CanonicalState) -> bool:
    """UniLM v2 keeps query, key and value in one matrix ``[3 * hidden, hidden]`` and has no key bias."""
    marker = ".attention.self.qkv_linear.weight"
    fused = [name for name in state.tensors if name.endswith(marker)]
    for name in fused:
        base = name.removesuffix("qkv_linear.weight")
        origin = state.origins.pop(name, name)
        weight = state.tensors.pop(name)
        for part, piece in zip(("query", "key", "value"), weight.chunk(3), strict=False):
            state.put(f"{base}{part}.weight", piece, origin)
        for part, old in (("query", f"{base}q_bias"), ("value", f"{base}v_bias")):
            if old in state.tensors:
                bias = state.tensors.pop(old)
                state.put(f"{base}{part}.bias", bias.reshape(-1), state.origins.pop(old, old))
        state.put(f"{base}key.bias", weight.new_zeros(weight.shape[0] // 3), origin)
    return bool(fused)


def tile_positions(table: Tensor, rows: int) -> Tensor:
    """Repeat the rows of a position table cyclically until there are ``rows`` of them."""
    return table[torch.arange(rows) % table.shape[0]]


def encoder_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an encoder of this configuration must have."""
    hidden, width, inner = config.hidden_size, config.embedding_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        WORD_EMBEDDINGS: (config.vocab_size, width),
        POSITION_EMBEDDINGS: (config.max_position_embeddings, width),
    }
    if config.type_vocab_size:
        shapes[TOKEN_TYPE_EMBEDDINGS] = (config.type_vocab_size, width)
    shapes |= {"bert.embeddings.LayerNorm.weight": (width,), "bert.embeddings.LayerNorm.bias": (width,)}
    if width != hidden:
        shapes |= _dense("bert.embeddings_project", hidden, width)
    if config.rel_pos_bins:
        shapes[RELATIVE_BIAS] = (config.num_attention_heads, config.rel_pos_bins)
    for layer in range(config.num_hidden_layers):
        base = f"bert.encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            shapes |= _dense(f"{base}attention.self.{part}", hidden, hidden)
        shapes |= _dense(f"{base}attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{base}attention.output.LayerNorm", hidden)
        shapes |= _dense(f"{base}intermediate.dense", inner, hidden)
        shapes |= _dense(f"{base}output.dense", hidden, inner)
        shapes |= _norm(f"{base}output.LayerNorm", hidden)
    return shapes


def lm_head_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the masked-language-model head."""
    width = config.embedding_size
    return {
        **_dense("cls.predictions.transform.dense", width, config.hidden_size),
        **_norm("cls.predictions.transform.LayerNorm", width),
        DECODER_WEIGHT: (config.vocab_size, width),
        DECODER_BIAS: (config.vocab_size,),
    }


def _dense(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def to_disk(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a canonical state into the tensors of the family's Hugging Face masked-language model.

    A tied output projection is left out, as transformers does. Position rows that the family never reads and
    token types that a model without them lacks are written as zeros.
    """
    family = next(key for key, types in _FAMILY_TYPES.items() if config.model_type in types)
    tensors = dict(state)
    if config.tie_word_embeddings:
        tensors.pop(DECODER_WEIGHT, None)
    elif DECODER_BIAS in tensors and family != "electra":
        # Untied, transformers reads the bias from here.
        tensors["cls.predictions.decoder.bias"] = tensors[DECODER_BIAS].clone()
    positions = tensors[POSITION_EMBEDDINGS]
    if config.position_offset:
        padding = positions.new_zeros(config.position_offset, positions.shape[1])
        tensors[POSITION_EMBEDDINGS] = torch.cat([padding, positions])
    if not config.type_vocab_size:
        tensors[TOKEN_TYPE_EMBEDDINGS] = positions.new_zeros(config.stored_type_vocab_size, positions.shape[1])
    rename = _disk_namer(family)
    return {rename(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _disk_namer(family: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for canonical, on_disk in _HEAD_PREFIXES[family]:
            if name.startswith(canonical):
                return on_disk + name.removeprefix(canonical)
        return f"{family}." + name.removeprefix("bert.") if name.startswith("bert.") else name

    return rename

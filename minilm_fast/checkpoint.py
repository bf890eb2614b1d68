"""Loading checkpoints of every known layout into one canonical form, and saving them for plain transformers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import layouts
from .atomic import sync_file, sync_folder, temporary_name
from .config import Config, read_json
from .errors import UserError
from .hub import Resolved, resolve
from .layouts import CanonicalState
from .tokenizer_record import check_tokenizer, recorded_tokenizer, with_record
from .weights import INDEX_FILES, SINGLE_FILES, find_weights, read_weights

if TYPE_CHECKING:
    from .tokenization import Tokenizer

__all__ = ["LoadedCheckpoint", "Resolved", "check_tokenizer", "load", "resolve", "save", "write_archive"]

_ARCHITECTURES = {
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaModel"),
    "electra": ("ElectraForMaskedLM", "ElectraModel"),
}


@dataclass
class LoadedCheckpoint:
    """What :func:`load` found.

    Args:
        config: the configuration, completed with what the weights say.
        state: fp32 tensors under canonical names (see :mod:`minilm_fast.layouts`). A tied output projection is the
            same tensor object as the word embedding.
        layout: what the file looked like, for example ``bert``, ``bert-bare``, ``bert-fused-qkv``, ``roberta``.
        missing: tensors that the file lacks and that are not needed by every use: those of the language-model
            head, and with ``for_training`` the relative-position bias.
        unexpected: the file's names of the tensors that ``state`` does not hold.
        tokenizer_record: which tokenizer the checkpoint was saved with, if it says.
        extra_state: the tensors behind ``unexpected`` (pooler, classifier, ...) under canonical names.
        path: the weights file.
    """

    config: Config
    state: dict[str, Tensor]
    layout: str
    missing: list[str]
    unexpected: list[str]
    tokenizer_record: Mapping[str, Any] | None = None
    extra_state: dict[str, Tensor] = field(default_factory=dict)
    path: Path = Path()

    def require_lm_head(self) -> None:
        """Raise ``UserError`` unless the language-model head is complete, as decoding needs it."""
        head = layouts.lm_head_shapes(self.config)
        absent = [name for name in self.missing if name in head]
        if absent:
            raise UserError(
                f"{self.path}: {absent[0]} is missing: an encoder without a language-model head cannot decode; "
                f"fine-tune it first"
            )


def load(
    path: str | os.PathLike[str],
    *,
    config: Config | str | os.PathLike[str] | None = None,
    model_type: str | None = None,
    for_training: bool = False,
    fold_token_types: bool = False,
) -> LoadedCheckpoint:
    """Load a checkpoint from a local folder or weights file.

    Args:
        path: a folder with weights (``model.safetensors``, ``pytorch_model.bin`` or the index of shards of either)
            and ``config.json``, or a weights file.
        config: a configuration, or the path of one, in place of the one beside the weights. If it has more
            positions than the checkpoint, the rows are repeated cyclically.
        model_type: the family, where neither names nor configuration tell.
        for_training: give tensors of their own memory, which may be written to, and accept that the
            relative-position bias is missing.
        fold_token_types: RoBERTa and XLM-R add the only row of a token-type table to every embedding. The original
            drops that row (it is zero in the published models); with this flag it is added to the position
            embeddings, which gives what transformers computes also where it is not zero.

    Raises:
        UserError: a file is missing or damaged, or tensor and configuration disagree: the message names the file,
            the tensor and both shapes.
    """
    weights = Path(path)
    if not weights.is_file():
        weights = find_weights(weights)
    tensors = read_weights(weights)
    if isinstance(config, Config):
        found = _canonicalize(weights, tensors, config.model_type)
        if layouts.model_type_of(found.family, config.model_type) != config.model_type:
            raise UserError(f"{weights}: weights of the family {found.family}, configuration of {config.model_type}")
        final = config
    else:
        config_file = _config_file(weights, config)
        raw = read_json(config_file)
        declared = _declared_type(raw)
        found = _canonicalize(weights, tensors, declared or model_type)
        final = _complete_config(raw, config_file, found, model_type, declared)
    _adapt_roberta(weights, final, found, fold_token_types)
    _adapt_positions(weights, final, found, warn=not isinstance(config, Config))
    return _assemble(weights, final, found, for_training)


def _config_file(weights: Path, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    stem = weights.name.split(".")[0]
    names = ["config.json"]
    if weights.name not in (*SINGLE_FILES, *INDEX_FILES):
        names = [f"{stem}-config.json", f"{stem}.json", "config.json"]
    for name in names:
        if (weights.parent / name).is_file():
            return weights.parent / name
    raise UserError(f"{weights}: no configuration beside it (looked for {', '.join(names)}); name one")


def _canonicalize(weights: Path, tensors: Mapping[str, Tensor], model_type: str | None) -> CanonicalState:
    found = layouts.canonicalize(tensors, model_type)
    if found is None:
        raise UserError(f"{weights}: no encoder of a known layout in this file")
    return found


def _declared_type(raw: Mapping[str, Any]) -> str | None:
    section = raw.get("minilm_fast")
    own = section.get("model_type") if isinstance(section, Mapping) else None
    declared = own or raw.get("model_type")
    return declared if isinstance(declared, str) else None


def _complete_config(
    raw: Mapping[str, Any], file: Path, found: CanonicalState, model_type: str | None, declared: str | None
) -> Config:
    family_type = layouts.model_type_of(found.family, model_type, declared)
    values = dict(raw)
    embeddings = found.tensors.get(layouts.WORD_EMBEDDINGS)
    if family_type == "electra" and "embedding_size" not in values and embeddings is not None:
        values["embedding_size"] = embeddings.shape[-1]
    return Config.from_dict(values, model_type=family_type, source=str(file))


def _assemble(weights: Path, config: Config, found: CanonicalState, for_training: bool) -> LoadedCheckpoint:
    shapes, head = layouts.encoder_shapes(config), layouts.lm_head_shapes(config)
    if config.rel_pos_bins == 0 and layouts.RELATIVE_BIAS in found.tensors:
        raise UserError(
            f"{weights}: holds {found.describe(layouts.RELATIVE_BIAS)}, but the configuration says rel_pos_bins 0"
        )
    _check_layers(weights, config, found)
    optional = {*head, layouts.RELATIVE_BIAS} if for_training else set(head)
    missing = _check_shapes(weights, {**shapes, **head}, found, optional)
    _choose_output_bias(found, config)
    state = {name: _to_fp32(weights, name, found, for_training) for name in (*shapes, *head) if name not in missing}
    config = _tie(config, state, missing)
    extra = {name: tensor for name, tensor in found.tensors.items() if name not in state}
    return LoadedCheckpoint(
        config=config,
        state=state,
        layout=found.layout,
        missing=missing,
        unexpected=[found.origins.get(name, name) for name in extra],
        tokenizer_record=recorded_tokenizer(config),
        extra_state=extra,
        path=weights,
    )


def _adapt_roberta(weights: Path, config: Config, found: CanonicalState, fold_token_types: bool) -> None:
    if found.family != "roberta":
        return
    positions = found.tensors.get(layouts.POSITION_EMBEDDINGS)
    types = found.tensors.get(layouts.TOKEN_TYPE_EMBEDDINGS)
    if positions is None or positions.dim() != 2 or positions.shape[0] <= config.position_offset:
        return
    usable = positions[config.position_offset :]
    if types is not None and types.dim() == 2 and types.shape[0] >= 1 and bool(types[0].any()):
        if fold_token_types:
            usable = usable.float() + types[0].float()
        else:
            warnings.warn(
                f"{weights}: the token-type row of this RoBERTa checkpoint is not zero and is dropped, as the "
                f"original does; load it with fold_token_types=True to get what transformers computes",
                stacklevel=3,
            )
    found.tensors[layouts.POSITION_EMBEDDINGS] = usable


def _adapt_positions(weights: Path, config: Config, found: CanonicalState, *, warn: bool) -> None:
    table = found.tensors.get(layouts.POSITION_EMBEDDINGS)
    wanted = config.max_position_embeddings
    if table is None or table.dim() != 2 or not 0 < table.shape[0] < wanted:
        return
    if warn:
        warnings.warn(
            f"{weights}: {table.shape[0]} positions are repeated cyclically to give the {wanted} that the "
            f"configuration asks for",
            stacklevel=3,
        )
    found.tensors[layouts.POSITION_EMBEDDINGS] = layouts.tile_positions(table, wanted)


def _check_layers(weights: Path, config: Config, found: CanonicalState) -> None:
    prefix = "bert.encoder.layer."
    numbers = {name.removeprefix(prefix).split(".")[0] for name in found.tensors if name.startswith(prefix)}
    layers = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
    if layers != config.num_hidden_layers:
        raise UserError(
            f"{weights}: holds {layers} encoder layers, the configuration asks for {config.num_hidden_layers}"
        )


def _check_shapes(
    weights: Path, shapes: Mapping[str, tuple[int, ...]], found: CanonicalState, optional: set[str]
) -> list[str]:
    missing, wrong = [], []
    for name, shape in shapes.items():
        if name not in found.tensors:
            missing.append(name)
        elif tuple(found.tensors[name].shape) != shape:
            wrong.append((name, shape))
    if wrong:
        name, shape = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors disagree)" if len(wrong) > 1 else ""
        raise UserError(
            f"{weights}: {found.describe(name)} has shape {list(found.tensors[name].shape)}, the configuration "
            f"asks for {list(shape)}{more}"
        )
    needed = [name for name in missing if name not in optional]
    if needed:
        more = f" (and {len(needed) - 1} more)" if len(needed) > 1 else ""
        raise UserError(f"{weights}: tensor {needed[0]} of shape {list(shapes[needed[0]])} is missing{more}")
    return missing


def _choose_output_bias(found: CanonicalState, config: Config) -> None:
    """Where both names of the output bias differ, transformers uses the projection's own only if it is untied."""
    alias = "cls.predictions.decoder.bias"
    if alias in found.tensors:
        chosen = found.tensors.pop(alias)
        if not config.tie_word_embeddings and chosen.shape == found.tensors[layouts.DECODER_BIAS].shape:
            found.put(layouts.DECODER_BIAS, chosen, found.origins.get(alias, alias))


def _to_fp32(weights: Path, name: str, found: CanonicalState, own_memory: bool) -> Tensor:
    tensor = found.tensors[name]
    if not tensor.is_floating_point():
        raise UserError(f"{weights}: {found.describe(name)} is of type {tensor.dtype}, expected floating point")
    converted = tensor.detach().to(torch.float32)
    check_finite(f"{weights}: {found.describe(name)}", converted)
    is_view = converted.untyped_storage().nbytes() > converted.numel() * 4 and not converted.is_contiguous()
    return converted.clone(memory_format=torch.contiguous_format) if own_memory or is_view else converted


def check_finite(what: str, tensor: Tensor) -> None:
    """Make sure that a weight can be computed with.

    Raises:
        UserError: it holds NaN or infinity; the message begins with ``what``.
    """
    if tensor.numel() and not all(bool(value.isfinite()) for value in torch.aminmax(tensor)):
        raise UserError(f"{what} holds NaN or infinity: the file is damaged, or its training had diverged")


def _tie(config: Config, state: dict[str, Tensor], missing: list[str]) -> Config:
    embeddings = state[layouts.WORD_EMBEDDINGS]
    if layouts.DECODER_WEIGHT not in state:
        if config.tie_word_embeddings:
            missing.remove(layouts.DECODER_WEIGHT)
            state[layouts.DECODER_WEIGHT] = embeddings
        return config
    if config.tie_word_embeddings and torch.equal(state[layouts.DECODER_WEIGHT], embeddings):
        state[layouts.DECODER_WEIGHT] = embeddings
        return config
    return config.replace(tie_word_embeddings=False)


def save(
    folder: str | os.PathLike[str],
    config: Config,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
    *,
    weight_format: str = "safetensors",
    architecture: str | None = None,
) -> None:
    """Save a checkpoint that plain transformers loads with equal results, and record which tokenizer it needs.

    Writes ``model.safetensors``, ``config.json`` and the tokenizer's files. Everything is first written and synced
    under temporary names. A new folder then appears at once; in a folder that exists the files are renamed one by
    one, so that each is whole at any moment and an error such as a full disk leaves all old ones as they were.

    Args:
        folder: where to; created if need be.
        config: of the family that decides the layout on disk.
        state: tensors under canonical names; others (a classifier, a pooler) are written as they are named.
        tokenizer: saved beside the weights. Without one an earlier record in ``config`` is kept.
        weight_format: ``"safetensors"``, ``"bin"`` (``pytorch_model.bin``, which older programs read) or ``"both"``.
        architecture: the class of transformers that the file names; by default the masked-language model if there is
            its head, else the encoder.

    Raises:
        UserError: ``state`` does not fit ``config``, or the folder cannot be written.
    """
    target = Path(folder)
    config = _config_to_save(config, state)
    if tokenizer is not None:
        config = with_record(config, tokenizer.record())
        check_tokenizer(config, recorded_tokenizer(config), tokenizer)
    tensors = layouts.to_disk(config, state)
    with _staging_folder(target) as staging:
        if weight_format in ("safetensors", "both"):
            _write_safetensors(tensors, staging / "model.safetensors")
        if weight_format in ("bin", "both"):
            with open(staging / "pytorch_model.bin", "wb") as stream:
                write_archive({name: tensor.contiguous() for name, tensor in tensors.items()}, stream)
        if tokenizer is not None:
            tokenizer.save(staging)
        text = json.dumps(_config_on_disk(config, state, architecture), indent=2, sort_keys=True) + "\n"
        (staging / "config.json").write_text(text, encoding="utf-8")
        for file in staging.iterdir():
            sync_file(file)
        _publish(staging, target)


def _config_to_save(config: Config, state: Mapping[str, Tensor]) -> Config:
    shapes = {**layouts.encoder_shapes(config), **layouts.lm_head_shapes(config)}
    head = layouts.lm_head_shapes(config)
    for name, shape in shapes.items():
        if name not in state and name not in head:
            raise UserError(f"cannot save the checkpoint: {name} is missing")
        if name in state and tuple(state[name].shape) != shape:
            raise UserError(
                f"cannot save the checkpoint: {name} has shape {list(state[name].shape)}, the configuration asks "
                f"for {list(shape)}"
            )
    embeddings, decoder = state[layouts.WORD_EMBEDDINGS], state.get(layouts.DECODER_WEIGHT)
    tied = decoder is None or decoder is embeddings or torch.equal(decoder, embeddings)
    return config.replace(tie_word_embeddings=tied and (config.tie_word_embeddings or decoder is None))


def _config_on_disk(config: Config, state: Mapping[str, Tensor], architecture: str | None) -> dict[str, Any]:
    values = config.to_dict()
    for key in ("dtype", "transformers_version", "_name_or_path", "name_or_path"):
        values.pop(key, None)
    with_head, encoder_only = _ARCHITECTURES.get(config.model_type, ("BertForMaskedLM", "BertModel"))
    values["architectures"] = [architecture or (with_head if layouts.DECODER_BIAS in state else encoder_only)]
    values["torch_dtype"] = "float32"
    return values


def _write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    distinct: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        distinct[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    try:
        save_file(distinct, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    # safetensors writes files that only their owner may read; this one is to be like any other file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(file, 0o666 & ~mask)


def write_archive(values: Mapping[str, Any], stream: IO[bytes]) -> None:
    """``torch.save`` whose errors of writing are ``OSError``."""
    try:
        torch.save(dict(values), stream)
    except RuntimeError as error:
        # The writer hides the error of the stream behind one of its own.
        hidden = error.__context__
        raise hidden if isinstance(hidden, OSError) else OSError(errno.EIO, str(error).splitlines()[0]) from error


@contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    staging = temporary_name(target) if not target.exists() else temporary_name(target / "checkpoint")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
    except OSError as error:
        raise UserError(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    sync_folder(staging)
    if not target.exists():
        os.rename(staging, target)
        sync_folder(target.parent)
        return
    # The configuration last: until it is there, a folder that was empty is not taken for a checkpoint.
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, target / file.name)
    sync_folder(target)

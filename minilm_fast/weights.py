"""Reading weight files, which come from anywhere: safetensors or PyTorch pickles, whole or in shards."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .config import read_json
from .errors import UserError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# In the order they are looked for: safetensors before pickles.
WEIGHT_FILES = (SINGLE_FILES[0], INDEX_FILES[0], SINGLE_FILES[1], INDEX_FILES[1])

_ZIP_MAGIC = b"PK\x03\x04"
_LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
_FOREIGN_FILES = ("tf_model.h5", "flax_model.msgpack", "model.onnx")
# Wrappers that trainers put around a state dict.
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "module")


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """The weights file, or the index of its shards, in a checkpoint folder.

    Raises:
        UserError: there is none.
    """
    base = Path(folder)
    for name in WEIGHT_FILES:
        if (base / name).is_file():
            return base / name
    if not base.is_dir():
        raise UserError(f"{base}: no such file or folder")
    foreign = [name for name in _FOREIGN_FILES if (base / name).exists()]
    hint = f"; {foreign[0]} is of a kind that is not read" if foreign else ""
    raise UserError(f"{base}: no weights in this folder (looked for {', '.join(WEIGHT_FILES)}{hint})")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read every tensor of a weights file, or of all shards that an index names.

    Pickles are read with ``weights_only=True``: nothing in them is executed. Tensors keep their dtype and may be
    views of a read-only memory map.

    Raises:
        UserError: the file is missing, empty, cut off, a web page, a git-LFS pointer or not a weights file, or it
            holds objects other than tensors.
    """
    file = Path(path)
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    head = _read_head(file)
    if _header_size(head) is not None:
        return _read_safetensors(file)
    return _read_pickle(file, zipped=head.startswith(_ZIP_MAGIC))


def _read_head(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{file}: the file is empty")
    if head.startswith(_LFS_MAGIC):
        raise UserError(f"{file}: a git-LFS pointer, not the weights; run `git lfs pull`")
    if re.match(rb"\s*<(!doctype|html|head|\?xml|body|error)", head, re.IGNORECASE):
        raise UserError(f"{file}: a web page (HTML), not weights; download the file again")
    _check_format(file, head, size)
    return head


def _header_size(head: bytes) -> int | None:
    """Of a safetensors file, the length of its header; None of anything else.

    Its first byte may well be that of a pickle, which goes on with other bytes than zeros.
    """
    length: int = struct.unpack("<Q", head[:8])[0] if len(head) >= 9 else 0
    return length if head[8:9] == b"{" and length < 1 << 40 else None


def _check_format(file: Path, head: bytes, size: int) -> None:
    header_size = _header_size(head)
    if header_size is None:
        if head.startswith(_ZIP_MAGIC) or head[:1] == b"\x80":
            return
        raise UserError(f"{file}: not a weights file (neither safetensors nor a PyTorch file)")
    if 8 + header_size > size:
        raise UserError(f"{file}: the file is cut off ({size} bytes, its header alone says {8 + header_size})")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: the safetensors file is cut off or damaged ({_first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _read_pickle(file: Path, *, zipped: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|global:|type) ([\w.]+\.[\w.]+)", str(error))
        if refused:
            raise UserError(
                f"{file}: refused: the pickle refers to {refused.group(1)}, and only tensors are read from it"
            ) from None
        raise UserError(f"{file}: the file is damaged or holds more than tensors") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # on damaged bytes the unpickler raises whatever it runs into
        raise UserError(f"{file}: the PyTorch file is cut off or damaged ({_first_line(error)})") from None
    return _tensors_of(file, content)


def _tensors_of(file: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPER_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected named tensors, found {type(content).__name__}")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file}: holds no tensors")
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = shard_names(index)
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        content = read_weights(index.parent / shard)
        for name in names:
            if name not in content:
                raise UserError(f"{index.parent / shard}: {name} is missing, which {index.name} says is here")
            tensors[name] = content[name]
    return tensors


def shard_names(index: Path) -> dict[str, list[str]]:
    """The shards that an index lists, each with the names of its tensors.

    Raises:
        UserError: the index is broken, or a shard lies outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise UserError(f"{index}: {shard!r} is not the name of a file in this folder")
        shards.setdefault(shard, []).append(name)
    return shards


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]

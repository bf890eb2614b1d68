"""Finding a checkpoint by name: a folder, a weights file, or an id on a hub that speaks Hugging Face's protocol."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.json",
)
# Any of these is enough to make a tokenizer.
_VOCABULARY_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "tokenizer.json")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True)
class Resolved:
    """Where the parts of a checkpoint are on this machine.

    Args:
        weights: weights file or index of shards.
        config: ``config.json``, or ``None`` to use what lies beside the weights.
        tokenizer: what ``Tokenizer.from_pretrained`` takes, or ``None`` if there is no vocabulary.
    """

    weights: Path
    config: Path | None
    tokenizer: str | None


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    config_name: str | os.PathLike[str] | None = None,
    tokenizer_name: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Resolved:
    """Find weights, configuration and tokenizer.

    Args:
        name_or_path: a folder, a weights file, or a hub id such as ``microsoft/MiniLM-L12-H384-uncased``, which is
            downloaded once into the hub's cache.
        config_name: a configuration file, a folder or a hub id, in place of the one beside the weights.
        tokenizer_name: a vocabulary file, a folder or a hub id, in place of what lies beside the weights.
        cache_dir: the hub's cache, by default the one of ``huggingface_hub`` (``HF_HOME``, ``HF_HUB_CACHE``).

    ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured.

    Raises:
        UserError: something is neither here nor on the hub, or the hub cannot be reached.
    """
    from .weights import WEIGHT_FILES, find_weights

    local = Path(name_or_path)
    folder: Path | None = None
    if local.is_dir():
        folder, weights = local, find_weights(local)
    elif local.is_file():
        weights = local
    else:
        folder = fetch(name_or_path, ["config.json"], cache_dir=cache_dir)
        weights = _fetch_weights(str(name_or_path), folder.name, WEIGHT_FILES, cache_dir)
    config = None if config_name is None else _resolve_config(config_name, cache_dir)
    tokenizer = None if tokenizer_name is None else str(tokenizer_name)
    if tokenizer is None and local.is_dir():
        tokenizer = str(local) if any((local / name).is_file() for name in _VOCABULARY_FILES) else None
    elif tokenizer is None and folder is not None:
        tokenizer = _fetch_tokenizer(str(name_or_path), folder.name, cache_dir)
    return Resolved(weights=weights, config=config, tokenizer=tokenizer)


def fetch(
    repository: str | os.PathLike[str],
    required: Iterable[str],
    optional: Iterable[str] = (),
    *,
    revision: str = "main",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Bring files of a hub repository into the cache; returns the folder of the snapshot that holds them.

    Args:
        repository: hub id, ``name`` or ``owner/name``.
        required: files that must be there.
        optional: files that are taken if they are.
        revision: branch, tag or commit.

    Raises:
        UserError: no such repository or file, no connection, or a transfer that was cut off.
    """
    name = str(repository)
    if not looks_like_id(name):
        raise UserError(f"{name}: no such file or folder")
    found: Path | None = None
    for file in required:
        path = _download(name, file, revision, cache_dir, required=True)
        if path is None:
            raise UserError(f"{name}: the hub repository has no {file}")
        found = path.parent
        # Files of one checkpoint come from one commit, even if somebody pushes meanwhile.
        revision = found.name
    for file in optional:
        path = _download(name, file, revision, cache_dir, required=False)
        if path is not None:
            found = path.parent
            revision = found.name
    if found is None:
        raise UserError(f"{name}: the hub repository has none of {', '.join(optional)}")
    return found


def fetch_optional(
    repository: str | os.PathLike[str],
    files: Iterable[str],
    *,
    revision: str,
    cache_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Bring those files of a hub repository that it has into the cache.

    Raises:
        UserError: a transfer was cut off.
    """
    for file in files:
        _download(str(repository), file, revision, cache_dir, required=False)


def looks_like_id(name: str) -> bool:
    """Whether a name that is no local path could be a hub id."""
    return bool(_ID.fullmatch(name)) and not name.endswith(_FILE_SUFFIXES) and ".." not in name and "--" not in name


def _resolve_config(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Path:
    path = Path(name)
    if path.is_dir():
        return path / "config.json"
    return path if path.is_file() else fetch(name, ["config.json"], cache_dir=cache_dir) / "config.json"


def _fetch_weights(
    repository: str, revision: str, names: Iterable[str], cache_dir: str | os.PathLike[str] | None
) -> Path:
    from .weights import shard_names

    for name in names:
        path = _download(repository, name, revision, cache_dir, required=False)
        if path is None:
            continue
        if name.endswith(".index.json"):
            fetch(repository, shard_names(path), revision=revision, cache_dir=cache_dir)
        return path
    where = "in the cache, and offline mode is on" if _offline() else "in the hub repository or the cache"
    raise UserError(f"{repository}: no weights {where} (looked for {', '.join(names)})")


def _fetch_tokenizer(repository: str, revision: str, cache_dir: str | os.PathLike[str] | None) -> str | None:
    folder = fetch(repository, ["config.json"], TOKENIZER_FILES, revision=revision, cache_dir=cache_dir)
    return str(folder) if any((folder / name).is_file() for name in _VOCABULARY_FILES) else None


def _download(
    repository: str, file: str, revision: str, cache_dir: str | os.PathLike[str] | None, *, required: bool
) -> Path | None:
    """One file's path in the cache; ``None`` if the repository exists without it, as far as can be told."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    directory = None if cache_dir is None else str(cache_dir)
    if _COMMIT.fullmatch(revision):
        # What is known of a commit never changes, so it need not be asked again.
        known = try_to_load_from_cache(repository, file, cache_dir=directory, revision=revision)
        if known is not None:
            return Path(known) if isinstance(known, str) else None
    problem = None if _offline() else _connection_problem(repository, file, revision)
    try:
        path = hf_hub_download(
            repository,
            file,
            revision=revision,
            cache_dir=directory,
            endpoint=_endpoint(),
            local_files_only=_offline() or problem is not None,
        )
    except hub.LocalEntryNotFoundError:
        if not required and _is_cached(repository, cache_dir):
            return None
        state = "offline mode is on" if problem is None else f"the hub cannot be reached ({problem})"
        raise UserError(f"{repository}: {file} is not in the cache, and {state}") from None
    except hub.RemoteEntryNotFoundError:
        return None
    except hub.GatedRepoError:
        raise UserError(f"{repository}: the hub asks for a login with access to this repository") from None
    except hub.RepositoryNotFoundError:
        raise UserError(f"{repository}: neither a local file or folder nor a repository on the hub") from None
    except hub.HFValidationError as error:
        raise UserError(f"{repository}: not a hub id: {_one_line(error)}") from None
    except Exception as error:
        if not _is_transfer_error(error):
            raise
        raise UserError(f"{repository}: {file}: the download failed: {_one_line(error)}") from None
    if problem is not None:
        warnings.warn(f"{repository}: the hub cannot be reached ({problem}); {file} is the cached one", stacklevel=4)
    return Path(path)


def _connection_problem(repository: str, file: str, revision: str) -> str | None:
    """Why the hub cannot be reached. Asking once here spares the minutes of huggingface_hub's own repetitions."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, endpoint=_endpoint()))
    except hub.HfHubHTTPError as error:
        # Other answers than a failure of the server are for the download itself to report.
        return _one_line(error) if error.response is not None and error.response.status_code >= 500 else None
    except hub.HFValidationError:
        return None
    except Exception as error:
        if not _is_transfer_error(error):
            raise
        return _one_line(error)
    return None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _is_transfer_error(error: Exception) -> bool:
    # The transport library differs between versions of huggingface_hub, so its errors are told by where they live.
    module = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or module in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _is_cached(repository: str, cache_dir: str | os.PathLike[str] | None) -> bool:
    from huggingface_hub import constants

    root = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HUB_CACHE)
    snapshots = root / f"models--{repository.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def _offline() -> bool:
    from huggingface_hub import constants

    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.strip().upper() in ("1", "ON", "YES", "TRUE") or bool(constants.HF_HUB_OFFLINE)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).split(" For more information")[0]
    return f"{type(error).__name__}: {text}"[:240]

"""Tokenised features in an Arrow file that all ranks map into memory.

A cache file is an Arrow stream as ``datasets`` writes it (``datasets.Dataset.from_file`` reads it), followed by a
trailer: JSON that says what the features were made from and has a checksum of the stream, the checksum of that JSON,
its length and a magic number. Every byte is covered by a checksum. The file appears under its name only when it is
whole, and replaces the one before it in one step, so several processes may build it at the same time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from minilm_fast.atomic import atomic_write, remove_quietly
from minilm_fast.data.features import FeatureChunk, FeatureStore, TokenCounts, read_features, tokenise_file
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

logger = logging.getLogger(__name__)

# Raise this when the content of the file changes, or the tokens that a text gives.
_FORMAT = 1
# Another one is needed only if the trailer itself changes.
_MAGIC = b"MLFFEAT1"
_TAIL = struct.Struct("<32sQ8s")
_ARROW_START = b"\xff\xff\xff\xff"
_LARGEST_TRAILER = 1 << 16
# A temporary file that nobody has written to for so many seconds belongs to a process that was killed.
_ABANDONED_AFTER = 3600.0


def datasets_installed() -> bool:
    """Whether the package that caches are written and read with is there."""
    return importlib.util.find_spec("datasets") is not None


def load_features(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    cache_file: str | Path | None = None,
    required: bool = True,
    num_proc: int = 1,
) -> FeatureStore:
    """Features of a JSON-lines file, from a cache file if one is named, which is built or rebuilt as needed.

    One process does it all here; for several ranks see :func:`build_cache` and :func:`open_cache`.

    Args:
        path: JSON lines, plain, gzip or xz.
        cache_file: where the features are kept; None keeps them in memory.
        required: whether a cache that is impossible is an error; if not, features stay in memory and a line says why.
        num_proc: processes that tokenise.

    Raises:
        UserError: the data is wrong, the cache cannot be written, or ``datasets`` is not installed.
    """
    if cache_file is not None:
        obstacle = _obstacle(path)
        if obstacle is None:
            build_cache(path, tokenizer, cache_file, num_proc=num_proc)
            return open_cache(path, tokenizer, cache_file)
        if required:
            raise UserError(f"{cache_file}: {obstacle}")
        logger.info("%s: the features stay in memory", obstacle)
    return read_features(path, tokenizer, num_proc)


def build_cache(path: str | Path, tokenizer: Tokenizer, cache_file: str | Path, *, num_proc: int = 1) -> bool:
    """Make sure that ``cache_file`` is whole and holds the features of ``path``; one line says why it is rebuilt.

    Reads the data file (and a cache that is there) once to compare checksums. The data is tokenised as a stream:
    it need not fit in memory.

    Returns:
        whether the cache was built, rather than found.

    Raises:
        UserError: as :func:`load_features`; also if ``cache_file`` is there and no feature cache at all, so that a
            wrong name does not cost a file.
    """
    target = Path(cache_file)
    obstacle = _obstacle(path)
    if obstacle is not None:
        raise UserError(f"{target}: {obstacle}")
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is there and is no file: name another one")
    stamp = _stamp(path)
    fingerprint = _fingerprint(path, tokenizer)
    if target.exists():
        problem = _problem(target, fingerprint)
        if problem is None:
            logger.info("features of %s: %s", path, target)
            return False
        logger.info("%s %s: building it again", target, problem)
    _remove_abandoned(target)
    _write(path, tokenizer, target, fingerprint, stamp, num_proc)
    return True


def open_cache(path: str | Path, tokenizer: Tokenizer, cache_file: str | Path) -> FeatureStore:
    """Features of a cache that :func:`build_cache` has just checked or built, maybe in another process.

    The features are mapped, so ranks on one machine share their memory. Only the trailer is checked here (with the
    vocabulary and the size of the data file), not the checksum of all features.

    Raises:
        UserError: there is no such cache, or it is for another file or vocabulary.
    """
    target = Path(cache_file)
    if not datasets_installed():
        raise UserError(f"{target}: {_NO_DATASETS}")
    trailer = _read_trailer(target)
    if trailer is None:
        raise UserError(f"{target} is not there, cut off or damaged: build it first")
    expected = {"format": _FORMAT, "tokenizer": tokenizer_digest(tokenizer), "data_bytes": _stamp(path)[0]}
    if any(trailer.fingerprint.get(name) != value for name, value in expected.items()):
        raise UserError(f"{target} was not made from {path} with the vocabulary {tokenizer.source}: build it again")
    store = FeatureStore(_mapped_chunks(target), TokenCounts(trailer.tokens, trailer.unknown))
    if len(store) != trailer.examples:
        raise UserError(f"{target} was replaced while it was opened")
    return store


_NO_DATASETS = "the package datasets is not installed (pip install 'minilm_fast[train]')"


def _obstacle(path: str | Path) -> str | None:
    if not datasets_installed():
        return _NO_DATASETS
    if os.path.exists(path) and not os.path.isfile(path):
        return f"{path} is not a regular file and cannot be cached"
    return None


@dataclass(frozen=True)
class _Trailer:
    fingerprint: dict[str, Any]
    examples: int
    tokens: int
    unknown: int
    arrow_bytes: int
    arrow_sha256: str


def _stamp(path: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _fingerprint(path: str | Path, tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            digest, size = stream_digest(stream)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return {"format": _FORMAT, "data_sha256": digest, "data_bytes": size, "tokenizer": tokenizer_digest(tokenizer)}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of the files that a tokenizer is saved to: all that it tokenises with."""
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for file in sorted(Path(folder).iterdir()):
            found.update(f"{file.name} {file.stat().st_size}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def stream_digest(stream: IO[bytes], size: int | None = None) -> tuple[str, int]:
    """SHA-256 of a stream, or of its next ``size`` bytes, and the number of bytes there were."""
    found, seen = hashlib.sha256(), 0
    while block := stream.read(1 << 20 if size is None else min(1 << 20, size - seen)):
        found.update(block)
        seen += len(block)
    return found.hexdigest(), seen


def digest_of(path: Path) -> str:
    """What a run is known by that reads this file: part of its SHA-256."""
    with open(path, "rb") as file:
        digest, _ = stream_digest(file)
    return f"sha256 {digest[:16]}"


def _read_trailer(cache_file: Path) -> _Trailer | None:
    """The trailer, if it is whole and fits the length of the file."""
    try:
        with open(cache_file, "rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end < _TAIL.size:
                return None
            stream.seek(end - _TAIL.size)
            digest, length, magic = _TAIL.unpack(stream.read(_TAIL.size))
            if magic != _MAGIC or length > min(_LARGEST_TRAILER, end - _TAIL.size):
                return None
            stream.seek(end - _TAIL.size - length)
            content = stream.read(length)
    except OSError:
        return None
    if hashlib.sha256(content).digest() != digest:
        return None
    trailer = _Trailer(**json.loads(content))
    return trailer if trailer.arrow_bytes + length + _TAIL.size == end else None


def _problem(cache_file: Path, fingerprint: dict[str, Any]) -> str | None:
    """Why an existing file cannot be used; None if it can."""
    trailer = _read_trailer(cache_file)
    if trailer is None:
        _refuse_other_files(cache_file)
        return "is cut off or damaged"
    if trailer.fingerprint != fingerprint:
        found = trailer.fingerprint
        if found.get("format") != fingerprint["format"]:
            return "was written by another version"
        if found["tokenizer"] != fingerprint["tokenizer"]:
            return "was made with another vocabulary or case"
        return "was made from other data"
    try:
        with open(cache_file, "rb") as stream:
            digest, _ = stream_digest(stream, trailer.arrow_bytes)
    except OSError:
        return "cannot be read"
    return None if digest == trailer.arrow_sha256 else "is damaged"


def _refuse_other_files(cache_file: Path) -> None:
    try:
        with open(cache_file, "rb") as stream:
            start = stream.read(len(_ARROW_START))
            stream.seek(-min(len(_MAGIC), stream.seek(0, os.SEEK_END)), os.SEEK_END)
            end = stream.read()
    except OSError as error:
        raise UserError(f"cannot read {cache_file}: {error.strerror}") from None
    if not _ARROW_START.startswith(start) and end != _MAGIC:
        raise UserError(f"{cache_file} is there and is no feature cache: name another file, or remove it")


def _remove_abandoned(cache_file: Path) -> None:
    for file in cache_file.parent.glob(f".{cache_file.name}.*.tmp"):
        try:
            idle = time.time() - file.stat().st_mtime
        except OSError:
            continue
        if idle > _ABANDONED_AFTER:
            remove_quietly(file)


class _HashingStream:
    """What the Arrow writer needs of a file; keeps count and checksum of all that passes."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.stream.write(data)

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        self.stream.flush()


def _write(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_file: Path,
    fingerprint: dict[str, Any],
    stamp: tuple[int, int],
    num_proc: int,
) -> None:
    start = time.perf_counter()
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{cache_file}: cannot be written: {error.strerror}") from None
    with atomic_write(cache_file) as stream:
        hashing = _HashingStream(stream)
        examples, counts = _write_arrow(hashing, path, tokenizer, num_proc)
        if _stamp(path) != stamp:
            raise UserError(f"{path} changed while it was read")
        trailer = {
            "fingerprint": fingerprint,
            "examples": examples,
            "tokens": counts.tokens,
            "unknown": counts.unknown,
            "arrow_bytes": hashing.size,
            "arrow_sha256": hashing.digest.hexdigest(),
        }
        content = json.dumps(trailer).encode()
        stream.write(content + _TAIL.pack(hashlib.sha256(content).digest(), len(content), _MAGIC))
    seconds = time.perf_counter() - start
    logger.info("features of %s: %d examples tokenised in %.0f s, kept in %s", path, examples, seconds, cache_file)


def _write_arrow(
    stream: _HashingStream, path: str | Path, tokenizer: Tokenizer, num_proc: int
) -> tuple[int, TokenCounts]:
    import pyarrow
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    columns = Features({"source_ids": Sequence(Value("int32")), "target_ids": Sequence(Value("int32"))})
    counts = TokenCounts()
    writer = ArrowWriter(features=columns, stream=stream)
    for chunk, of_chunk in tokenise_file(path, tokenizer, num_proc):
        lists = [
            pyarrow.ListArray.from_arrays(offsets.astype(np.int32), ids)
            for ids, offsets in (
                (chunk.source_ids, chunk.source_offsets),
                (chunk.target_ids, chunk.target_offsets),
            )
        ]
        writer.write_table(pyarrow.Table.from_arrays(lists, names=list(columns)), writer_batch_size=len(chunk))
        counts += of_chunk
    examples, _ = writer.finalize(close_stream=False)
    return examples, counts


def _mapped_chunks(cache_file: Path) -> list[FeatureChunk]:
    from datasets import Dataset

    chunks = []
    for batch in Dataset.from_file(str(cache_file)).data.table.to_batches():
        source, target = batch.column("source_ids"), batch.column("target_ids")
        chunks.append(
            FeatureChunk(
                source.values.to_numpy(), source.offsets.to_numpy(), target.values.to_numpy(), target.offsets.to_numpy()
            )
        )
    return chunks

"""A corpus tokenised once, in an Arrow file that all processes map into memory.

The file has one row for each document, or several for one that is longer than a chunk: its ids, and whether the
document ends there. It knows nothing of sequence lengths, so one file serves runs of any length. Its last record
batch is empty and carries a summary; a file without it was not finished.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from minilm_fast.atomic import atomic_write
from minilm_fast.data.corpus import Corpus, Fragment
from minilm_fast.data.feature_cache import tokenizer_digest
from minilm_fast.data.features import TokenCounts
from minilm_fast.data.parallel import ordered_map
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

logger = logging.getLogger(__name__)

# Raise this when the content of the file changes, or the tokens that a text gives.
_FORMAT = 1
_MAGIC = b"ARROW1"
_IDENTITY, _SUMMARY = b"minilm_fast corpus", b"summary"
# Text is tokenised, sent between processes and stored in chunks of about so many characters.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring pieces of documents: their ids one after the other, where each ends, and which end a document.

    ``unknown`` of the tokens are not in the vocabulary, where that is counted.
    """

    ids: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    unknown: int


class _TokeniseChunk:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, fragments: list[Fragment]) -> _Chunk:
        ids, offsets, ends = array("i"), array("i", [0]), []
        for number, (text, end) in enumerate(fragments, 1):
            ids.extend(self.tokenizer.encode(text))
            if end or (number == len(fragments) and len(ids) > offsets[-1]):
                offsets.append(len(ids))
                ends.append(end)
        tokens = np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, dtype=np.int32)
        unknown = int(np.count_nonzero(tokens == self.tokenizer.unk_id))
        return _Chunk(tokens, np.frombuffer(offsets, dtype=np.int32), np.asarray(ends, dtype=bool), unknown)


def _chunks(fragments: Iterator[Fragment]) -> Iterator[list[Fragment]]:
    chunk: list[Fragment] = []
    size = 0
    for fragment in fragments:
        chunk.append(fragment)
        # An empty fragment takes memory too.
        size += len(fragment[0]) + 64
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _require_arrow() -> None:
    try:
        import pyarrow.ipc  # noqa: F401
    except ImportError:
        raise UserError("tokenised corpora are kept in Arrow files: pip install 'minilm_fast[train]'") from None


def _identity(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"format": _FORMAT, "tokenizer": tokenizer_digest(tokenizer), "corpus": corpus.identity()}


def build_corpus(corpus: Corpus, tokenizer: Tokenizer, cache_file: str | Path, *, num_proc: int = 1) -> bool:
    """Make sure that ``cache_file`` holds the tokens of the corpus as it is now; one line says why it is rebuilt.

    The corpus is read as a stream, so neither it nor a document need fit in memory. The file appears when it is
    whole. Whether a file of the corpus has changed is told by its size and time, whether the tokens are whole by a
    checksum.

    Args:
        num_proc: processes that tokenise; the result does not depend on it.

    Returns:
        whether it was built, rather than found.

    Raises:
        UserError: the text is wrong or there is none, the vocabulary knows none of it, or ``cache_file`` is a file of
            another kind or cannot be written.
    """
    _require_arrow()
    target = Path(cache_file)
    identity = _identity(corpus, tokenizer)
    problem = _problem(target, identity)
    if problem is None:
        logger.info("tokens of %s: %s", corpus.describe(), target)
        return False
    if problem:
        logger.info("%s %s: building it again", target, problem)
    start = time.perf_counter()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    with atomic_write(target) as stream:
        counts = _write(stream, corpus, tokenizer, identity, num_proc)
        if corpus.identity() != identity["corpus"]:
            raise UserError(f"{corpus.describe()} changed while it was read")
    logger.info(
        "%s: %d tokens in %d documents, %.2f%% unknown, tokenised in %.0f s, kept in %s",
        corpus.describe(),
        counts.tokens,
        len(TokenisedCorpus(target).lengths),
        100 * counts.unknown / counts.tokens,
        time.perf_counter() - start,
        target,
    )
    return True


def _problem(target: Path, identity: dict[str, Any]) -> str | None:
    """Why an existing file cannot be used; None if it can, empty if there is none."""
    try:
        with open(target, "rb") as stream:
            magic = stream.read(len(_MAGIC))
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {target}: {error.strerror}") from None
    if not _MAGIC.startswith(magic):
        raise UserError(f"{target} is there and is no tokenised corpus: name another file, or remove it")
    try:
        found = TokenisedCorpus(target)
    except UserError:
        return "is cut off or damaged"
    if found.identity.get("format") != identity["format"]:
        return "was written by another version"
    if found.identity.get("tokenizer") != identity["tokenizer"]:
        return "was made with another vocabulary or case"
    # As it comes back from JSON.
    if found.identity != json.loads(json.dumps(identity)):
        return "was made from other text"
    return None if found.is_whole() else "is damaged"


def _write(stream: Any, corpus: Corpus, tokenizer: Tokenizer, identity: dict[str, Any], num_proc: int) -> TokenCounts:
    import pyarrow

    columns = [("input_ids", pyarrow.list_(pyarrow.int32())), ("document_ends", pyarrow.bool_())]
    schema = pyarrow.schema(columns, metadata={_IDENTITY: json.dumps(identity).encode()})
    counts, digest = TokenCounts(), hashlib.sha256()
    chunks = ordered_map(_TokeniseChunk(tokenizer), _chunks(corpus.fragments()), num_proc, corpus.describe())
    with pyarrow.ipc.new_file(stream, schema) as writer:
        for chunk in chunks:
            counts += TokenCounts(len(chunk.ids), chunk.unknown)
            _add_to(digest, chunk)
            lists = pyarrow.ListArray.from_arrays(chunk.offsets, chunk.ids)
            writer.write_batch(pyarrow.record_batch([lists, pyarrow.array(chunk.ends)], schema=schema))
        if not counts.tokens:
            raise UserError(f"{corpus.describe()} holds no text")
        counts.check(corpus.describe(), tokenizer)
        summary = {"tokens": counts.tokens, "sha256": digest.hexdigest()}
        empty = pyarrow.record_batch([pyarrow.array([], type=kind) for _, kind in columns], schema=schema)
        writer.write_batch(empty, custom_metadata={_SUMMARY: json.dumps(summary).encode()})
    return counts


def _mapped_chunk(batch: Any) -> _Chunk:
    # Lengths that a damaged file claims may lead beyond its end, where reading would end the process.
    batch.validate(full=True)
    column = batch.column(0)
    return _Chunk(
        column.values.to_numpy(), column.offsets.to_numpy(), batch.column(1).to_numpy(zero_copy_only=False), unknown=0
    )


def _add_to(digest: Any, chunk: _Chunk) -> None:
    for part in (chunk.ids, chunk.offsets, chunk.ends):
        digest.update(np.ascontiguousarray(part))


class TokenisedCorpus:
    """The tokens of a corpus, mapped from its file.

    Attributes:
        identity: what the file was made from.
        digest: a checksum of the tokens and the documents' ends.
        tokens: their number.
        lengths: tokens of each document, int64; documents without tokens are left out.

    Raises:
        UserError: the file is missing, was not finished, or is something else.
    """

    def __init__(self, cache_file: str | Path) -> None:
        _require_arrow()
        import pyarrow

        self.path = Path(cache_file)
        try:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path)))
            self.identity = json.loads(reader.schema.metadata[_IDENTITY])
            last = reader.num_record_batches - 1
            summary = json.loads(reader.get_batch_with_custom_metadata(last).custom_metadata[_SUMMARY])
            self.digest: str = summary["sha256"]
            self.tokens: int = summary["tokens"]
            self._chunks = [_mapped_chunk(reader.get_batch(i)) for i in range(last)]
            self._starts = [0, *itertools.accumulate(len(chunk.ids) for chunk in self._chunks)]
            pieces = np.concatenate([np.diff(chunk.offsets) for chunk in self._chunks]).astype(np.int64)
            self.lengths = _document_lengths(pieces, np.concatenate([chunk.ends for chunk in self._chunks]))
        except Exception as error:  # on damaged bytes the reader raises whatever it runs into
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: no tokenised corpus: {reason}") from None

    def is_whole(self) -> bool:
        """Whether all tokens are as they were written; reads the whole file."""
        digest = hashlib.sha256()
        for chunk in self._chunks:
            _add_to(digest, chunk)
        return digest.hexdigest() == self.digest

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the whole corpus, int32."""
        at = bisect.bisect_right(self._starts, start) - 1
        parts = []
        while start < stop:
            offset = start - self._starts[at]
            part = self._chunks[at].ids[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            at += 1
        return np.concatenate(parts)


def _document_lengths(pieces: np.ndarray, ends: np.ndarray) -> np.ndarray:
    last = np.flatnonzero(ends)
    sums = np.concatenate([[0], np.cumsum(pieces)])
    lengths = np.diff(sums[np.concatenate([[0], last + 1])])
    rest = sums[-1] - sums[last[-1] + 1 if len(last) else 0]
    return np.concatenate([lengths, [rest]])[np.concatenate([lengths, [rest]]) > 0]


class PackedSequences(Sequence[np.ndarray]):
    """The sequences that a corpus is cut into.

    A sequence is ``[CLS]``, tokens of one document, ``[SEP]``. A document of ``n`` tokens becomes
    ``ceil(n / (max_seq_length - 2))`` sequences of nearly equal lengths: every token of the corpus is in exactly one.

    Args:
        max_seq_length: the longest sequence, at least 3.

    Raises:
        UserError: ``max_seq_length`` is below 3.
    """

    def __init__(self, corpus: TokenisedCorpus, tokenizer: Tokenizer, max_seq_length: int) -> None:
        if max_seq_length < 3:
            raise UserError(f"--max_seq_length {max_seq_length}: a sequence needs at least 3 tokens")
        self.corpus = corpus
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self._pieces = -(-corpus.lengths // (max_seq_length - 2))
        self._first = np.concatenate([[0], np.cumsum(self._pieces)])
        self._starts = np.concatenate([[0], np.cumsum(corpus.lengths)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def lengths(self) -> np.ndarray:
        """Tokens of every sequence, int64."""
        start, stop = self._bounds(np.arange(len(self)))
        return stop - start + 2

    def _bounds(self, index: Any) -> tuple[Any, Any]:
        document = np.searchsorted(self._first, index, side="right") - 1
        piece, pieces = index - self._first[document], self._pieces[document]
        length, start = self.corpus.lengths[document], self._starts[document]
        return start + piece * length // pieces, start + (piece + 1) * length // pieces

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """Ids of a sequence, int32."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start, stop = self._bounds(index % len(self))
        ids = np.empty(stop - start + 2, dtype=np.int32)
        ids[0], ids[-1] = self.cls_id, self.sep_id
        ids[1:-1] = self.corpus.slice(int(start), int(stop))
        return ids

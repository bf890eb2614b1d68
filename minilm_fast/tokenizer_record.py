"""Which tokenizer a checkpoint belongs to: a note in its configuration, and the check against it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import Config
from .errors import UserError

if TYPE_CHECKING:
    from .tokenization import Tokenizer

_SECTION = "minilm_fast"
# Published checkpoints whose embeddings have more rows than their vocabulary: (tokens, rows).
_DOCUMENTED_PADDING = {(250002, 250037): "multilingual MiniLM"}


def recorded_tokenizer(config: Config) -> Mapping[str, Any] | None:
    """The record that a configuration carries, if any."""
    section = config.extra.get(_SECTION)
    record = section.get("tokenizer") if isinstance(section, Mapping) else None
    return record if isinstance(record, Mapping) else None


def with_record(config: Config, record: Mapping[str, Any]) -> Config:
    """A configuration that carries the record."""
    section = {**config.extra.get(_SECTION, {}), "tokenizer": dict(record)}
    return config.replace(extra={**config.extra, _SECTION: section})


def check_tokenizer(config: Config, record: Mapping[str, Any] | None, tokenizer: Tokenizer) -> None:
    """Make sure that a tokenizer is the one that a checkpoint was trained with.

    Without a record only sizes can be compared: a vocabulary larger than the embedding is an error, and so is a
    smaller one, unless the difference is the rounding up of the rows or known of a published checkpoint, which
    gives a warning.

    Raises:
        UserError: the tokenizer cannot be the right one; the message says why.
    """
    tokens, rows = tokenizer.vocab_size, config.vocab_size
    if record is not None:
        _check_record(record, tokenizer)
    if tokens > rows:
        raise UserError(
            f"{tokenizer.source}: {tokens} tokens, but the checkpoint's embedding has {rows} rows: this is another "
            f"model's vocabulary"
        )
    if tokens == rows or (record is not None and record.get("sha256")):
        return
    reason = _DOCUMENTED_PADDING.get((tokens, rows))
    if reason is None and rows % 8 == 0 and rows - tokens < 128:
        reason = "rounded up"
    if reason is None:
        raise UserError(
            f"{tokenizer.source}: {tokens} tokens, but the checkpoint's embedding has {rows} rows: this is another "
            f"model's vocabulary"
        )
    warnings.warn(
        f"{tokenizer.source}: {tokens} tokens for an embedding of {rows} rows ({reason}); the last "
        f"{rows - tokens} rows are taken for padding",
        stacklevel=2,
    )


def _check_record(record: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    own = tokenizer.record()
    if "sha256" in record and record["sha256"] != own["sha256"]:
        raise UserError(
            f"{tokenizer.source}: not the vocabulary that this checkpoint was saved with "
            f"({own['vocab_size']} tokens here, {record.get('vocab_size')} there, and their contents differ)"
        )
    if record.get("do_lower_case", own["do_lower_case"]) != own["do_lower_case"]:
        wanted = "with" if record["do_lower_case"] else "without"
        raise UserError(f"{tokenizer.source}: this checkpoint was saved with a tokenizer {wanted} do_lower_case")

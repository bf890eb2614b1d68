"""Real sources and the checkpoint that reads them, for the benchmarks over real text."""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from typing import IO, TYPE_CHECKING

from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast import Model


def add_arguments(parser: argparse.ArgumentParser, limit: int) -> None:
    """The options that name the data, the model and the search."""
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="JSON lines with 'src', maybe .xz")
    parser.add_argument("--limit", type=int, default=limit, help="sources, spread evenly over the file; 0: all")
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or hub id of a fine-tuned checkpoint")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--max-tgt-length", type=int, default=48)
    parser.add_argument("--ngram", type=int, default=3, help="no n-gram of that size twice; 0: allow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")


def search_options(options: argparse.Namespace) -> dict[str, object]:
    """What ``Model.generate`` is given in every run."""
    return {
        "batch_size": options.batch,
        "beam_size": options.beam,
        "max_seq_length": options.max_seq_length,
        "max_tgt_length": options.max_tgt_length,
        "forbid_duplicate_ngrams": options.ngram > 0,
        "ngram_size": max(options.ngram, 1),
        "forbid_ignore_word": ".",
    }


def load_model(options: argparse.Namespace) -> Model:
    """The checkpoint, its threads set.

    Raises:
        UserError: there is none, or it has no tokenizer.
    """
    import torch

    from minilm_fast import Model

    torch.set_num_threads(options.threads)
    model = Model.from_pretrained(options.model)
    if model.tokenizer is None:
        raise UserError(f"--model {options.model}: there is no tokenizer beside the weights")
    return model


def read_sources(options: argparse.Namespace) -> list[str | list[str]]:
    """The sources of ``--data``.

    Raises:
        UserError: the file is not there, is empty, or a line is not a JSON object with ``src``.
    """
    from minilm_fast.data.examples import parse_record, text_or_tokens

    path: Path = options.data
    sources = []
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    sources.append(text_or_tokens(parse_record(line, where), "src", where))
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"--data {path}: {getattr(error, 'strerror', None) or error}") from None
    if not sources:
        raise UserError(f"--data {path}: the file is empty")
    if options.limit <= 0 or options.limit >= len(sources):
        return sources
    return [sources[i * len(sources) // options.limit] for i in range(options.limit)]


def tokenize(model: Model, sources: list[str | list[str]], options: argparse.Namespace) -> list[list[str]]:
    """Tokens of each source, cut as decoding cuts them."""
    assert model.tokenizer is not None
    most = options.max_seq_length - options.max_tgt_length - 2
    return [(model.tokenizer.tokenize(s) if isinstance(s, str) else s)[:most] for s in sources]


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")

"""Real sentences of several files, and the cases that the encoder benchmark makes of them."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from peers.encoder_base import Case

from minilm_fast.errors import UserError

SENTENCE_COLUMNS = ("sentence", "sentence1", "sentence2", "question", "#1 String", "#2 String")
AS_THEY_COME, BY_LENGTH = "mixed, as they come", "mixed, by length"


def read(path: Path) -> list[str]:
    """The sentences of a file: of a tsv with a header its columns of sentences, of a SQuAD file its passages and
    questions, else a sentence a line. Files may be compressed with gzip or xz.

    Raises:
        UserError: the file cannot be read or holds none.
    """
    try:
        with _open(path) as file:
            content = file.read()
        kind = path.suffixes[-2 if path.suffix in (".xz", ".gz") else -1]
        texts = {".tsv": _tsv, ".json": _squad}.get(kind, str.splitlines)(content)
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"--texts {path}: {getattr(error, 'strerror', None) or error}") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--texts {path}: no sentences in it")
    return texts


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def _tsv(content: str) -> list[str]:
    header, *lines = content.split("\n")
    places = [i for i, name in enumerate(header.split("\t")) if name.strip() in SENTENCE_COLUMNS]
    if not places:
        raise ValueError(f"no column named {', '.join(SENTENCE_COLUMNS)}")
    rows = [line.split("\t") for line in lines]
    return [row[place] for row in rows for place in places if place < len(row)]


def _squad(content: str) -> list[str]:
    paragraphs = [paragraph for article in json.loads(content)["data"] for paragraph in article["paragraphs"]]
    return [text for p in paragraphs for text in (p["context"], *(qa["question"] for qa in p["qas"]))]


def choose(files: Sequence[Sequence[str]], count: int, seed: int) -> list[str]:
    """``count`` texts, as many from each file, drawn and mixed at random."""
    rng = random.Random(seed)
    shares = [count * (i + 1) // len(files) - count * i // len(files) for i in range(len(files))]
    texts = [
        text for file, share in zip(files, shares, strict=True) for text in rng.sample(file, min(share, len(file)))
    ]
    rng.shuffle(texts)
    return texts


def equal_case(batch: int, length: int, sequences: Sequence[Sequence[int]]) -> Case:
    """One batch of equal lengths, the words of ``sequences`` one after the other between their first and last token."""
    first, last = sequences[0][0], sequences[0][-1]
    words = [word for sequence in sequences for word in sequence[1:-1]]
    inner = length - 2
    rows = [[words[(i * inner + j) % len(words)] for j in range(inner)] for i in range(batch)]
    return Case(f"batch {batch}, length {length}", [[[first, *row, last] for row in rows]])


def mixed_cases(sequences: Sequence[list[int]], batch: int) -> list[Case]:
    """The sequences in batches, as they come and in order of length."""
    return [
        Case(name, [list(ordered[i : i + batch]) for i in range(0, len(ordered), batch)])
        for name, ordered in ((AS_THEY_COME, list(sequences)), (BY_LENGTH, sorted(sequences, key=len)))
    ]

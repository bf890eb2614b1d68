"""Byte-level BPE and SentencePiece tokenisation through the libraries that define them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import read_json
from .errors import UserError

_XLMR_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
# Fields of sentencepiece.proto: those of SentencePieceText, and of each piece in it.
_PIECES = 2
_PIECE, _BEGIN, _END = 1, 4, 5


class ByteLevelBpe:
    """RoBERTa's tokenisation: GPT-2's byte-level BPE, without a space put before the text.

    Args:
        vocabulary: token -> id.
        merges: pairs in order of priority.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: list[tuple[str, str]], source: str) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            self._tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges))
        except Exception as error:
            raise UserError(f"{source}: merges and vocabulary do not fit: {str(error).splitlines()[0]}") from None
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._decoder = decoders.ByteLevel()
        self.merges = merges

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text; a space is part of the word after it."""
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The tokens of a text, and the characters of the text that each stands for: ``start, end``, end exclusive."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.tokens, encoding.offsets

    def join(self, tokens: list[str]) -> str:
        """The text that the tokens spell."""
        return self._decoder.decode(tokens)


class SentencePiece:
    """XLM-R's tokenisation: a SentencePiece model whose ids are shifted as in fairseq.

    Args:
        model: the serialised SentencePiece model.
    """

    def __init__(self, model: bytes, source: str) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{source}: not a SentencePiece model, or damaged: {error}") from None
        first = [self._processor.id_to_piece(index) for index in range(min(3, len(self._processor)))]
        if first != ["<unk>", "<s>", "</s>"]:
            raise UserError(f"{source}: not an XLM-R model: its first pieces are {', '.join(first)}")
        self.model = model

    def tokens(self) -> list[str]:
        """Every token in the order of its id."""
        pieces = [self._processor.id_to_piece(index) for index in range(3, len(self._processor))]
        return [*_XLMR_FIRST, *pieces, "<mask>"]

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        return self._processor.encode(text, out_type=str)

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The pieces of a text, and the characters of the text that each stands for: ``start, end``, end exclusive."""
        # The one form with offsets that every version of the library gives, and without the package protobuf.
        parsed = _fields(self._processor.encode(text, out_type="serialized_proto"))
        pieces = [dict(_fields(value)) for field, value in parsed if field == _PIECES]
        # Offsets are of bytes; no value stands for 0.
        characters = [place for place, char in enumerate(text) for _ in char.encode()] + [len(text)]
        offsets = [(characters[piece.get(_BEGIN, 0)], characters[piece.get(_END, 0)]) for piece in pieces]
        return [piece[_PIECE].decode() for piece in pieces], offsets

    def join(self, tokens: list[str]) -> str:
        """The text that the pieces spell."""
        return "".join(tokens).replace("▁", " ").strip()


class UnigramFile:
    """XLM-R's tokenisation from a ``tokenizer.json``, for repositories that carry no SentencePiece model."""

    def __init__(self, content: Mapping[str, Any], source: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:
            raise UserError(f"{source}: not a usable tokenizer.json: {error}") from None
        self.content = content

    def tokens(self) -> list[str]:
        """Every token in the order of its id."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return sorted(vocabulary, key=lambda token: vocabulary[token])

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The tokens of a text, and the characters of the text that each stands for: ``start, end``, end exclusive."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.tokens, encoding.offsets

    def join(self, tokens: list[str]) -> str:
        """The text that the pieces spell."""
        return "".join(tokens).replace("▁", " ").strip()


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message: an integer, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        wire = key & 7
        value: int | bytes = varint() if wire in (0, 2) else 0
        if wire != 0:
            length = int(value) if wire == 2 else {1: 8, 5: 4}[wire]
            value = message[place : place + length]
            place += length
        yield key >> 3, value


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read a ``merges.txt``.

    Raises:
        UserError: a line is not a pair, naming the line.
    """
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise UserError(f"{path}: line {number}: expected two tokens")
        merges.append((pair[0], pair[1]))
    return merges


def read_id_map(path: Path) -> dict[str, int]:
    """Read a JSON file that maps tokens to ids.

    Raises:
        UserError: a value is not an id.
    """
    vocabulary = read_json(path)
    for token, index in vocabulary.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UserError(f"{path}: {token!r} has no valid id: {index!r}")
    return vocabulary


def read_text(path: Path) -> str:
    """Read a UTF-8 file with its line ends made uniform and without a byte-order mark.

    Raises:
        UserError: the file is missing, empty, not text, a web page or a git-LFS pointer.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            text = stream.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a vocabulary (it is not UTF-8 text)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not text:
        raise UserError(f"{path}: the file is empty")
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path}: a git-LFS pointer, not the vocabulary; run `git lfs pull`")
    if text.lstrip()[:9].lower() in ("<!doctype", "<html>\n<h") or text.lstrip()[:5].lower() == "<html":
        raise UserError(f"{path}: a web page (HTML), not a vocabulary; download the file again")
    return text

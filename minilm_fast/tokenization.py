"""Tokenizers of the BERT family, token for token as the checkpoints were trained with."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import hub
from .config import MODEL_TYPES, read_json
from .errors import UserError
from .subword import ByteLevelBpe, SentencePiece, UnigramFile, read_id_map, read_merges, read_text
from .wordpiece import WordPiece

_WORDPIECE, _BPE, _SENTENCEPIECE = "wordpiece", "bpe", "sentencepiece"
_ALGORITHMS = {"roberta": _BPE, "xlm-roberta": _SENTENCEPIECE}
_SPECIAL_TOKENS = {
    _WORDPIECE: {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"},
    _BPE: {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"},
    _SENTENCEPIECE: {"cls": "<s>", "sep": "</s>", "mask": "<mask>", "pad": "<pad>", "unk": "<unk>"},
}
_HF_CLASSES = {_WORDPIECE: "BertTokenizer", _BPE: "RobertaTokenizer", _SENTENCEPIECE: "XLMRobertaTokenizer"}
# The original writes this where a generated text holds a line break.
_LINE_BREAK = " [X_SEP] "


class _Subword(Protocol):
    def tokenize(self, text: str) -> list[str]: ...

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]: ...


@dataclass
class _Vocabulary:
    """What was read from disk, before specials and case are settled."""

    algorithm: str
    tokens: list[str]
    source: str
    merges: list[tuple[str, str]] = field(default_factory=list)
    backend: SentencePiece | UnigramFile | None = None
    lower_case: bool | None = None
    added: list[str] = field(default_factory=list)


class Tokenizer:
    """Text to tokens to ids and back.

    Attributes:
        model_type: ``bert``, ``minilm``, ``unilm``, ``electra``, ``roberta`` or ``xlm-roberta``.
        do_lower_case: whether text is lower-cased (and, for WordPiece, accents are stripped).
        source: where it was read from, for messages.
        tokens: token of every id; where a vocabulary file holds a token twice, both lines are here.
        vocabulary: token -> id. Of a token that a file holds twice the last line counts, as in the original.
        vocab_size: number of ids, which is the number of embedding rows that the vocabulary needs.
        cls_id, sep_id, mask_id, pad_id, unk_id: ids of the special tokens.
        special_tokens: the tokens that are recognised anywhere in a text.
    """

    def __init__(self, content: _Vocabulary, model_type: str, do_lower_case: bool) -> None:
        self.model_type = model_type
        self.do_lower_case = do_lower_case
        self.source = content.source
        self.tokens = content.tokens
        self.vocabulary = {token: index for index, token in enumerate(content.tokens)}
        self.vocab_size = len(content.tokens)
        self._content = content
        names = _SPECIAL_TOKENS[content.algorithm]
        self.special_tokens = [*names.values(), *content.added]
        for token in names.values():
            if token not in self.vocabulary:
                raise UserError(f"{self.source}: the vocabulary has no {token}: not one for model type {model_type}")
        self.cls_token, self.sep_token, self.mask_token = names["cls"], names["sep"], names["mask"]
        self.pad_token, self.unk_token = names["pad"], names["unk"]
        self.cls_id, self.sep_id = self.vocabulary[names["cls"]], self.vocabulary[names["sep"]]
        self.mask_id, self.pad_id = self.vocabulary[names["mask"]], self.vocabulary[names["pad"]]
        self.unk_id = self.vocabulary[names["unk"]]
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._subword = self._make_subword(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._content, self.model_type, self.do_lower_case)

    def _make_subword(self, content: _Vocabulary) -> _Subword:
        if content.backend is not None:
            return content.backend
        if content.algorithm == _BPE:
            return ByteLevelBpe(self.vocabulary, content.merges, self.source)
        return WordPiece(self.vocabulary, self.unk_token, self.do_lower_case, self.special_tokens)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        model_type: str = "bert",
        do_lower_case: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Tokenizer:
        """Load a tokenizer.

        Args:
            path_or_id: a folder, a ``vocab.txt``, a SentencePiece model, a ``tokenizer.json``, or a hub id.
            model_type: the family. A folder or file with only a SentencePiece or BPE vocabulary overrides it:
                multilingual MiniLM is a ``minilm`` with XLM-R's vocabulary.
            do_lower_case: by default what ``tokenizer_config.json`` says, else no.
            cache_dir: the hub's cache.

        Raises:
            UserError: nothing there, or a vocabulary that is broken or of another kind.
        """
        if model_type not in MODEL_TYPES:
            raise UserError(f"model type {model_type!r} is not supported (known: {', '.join(MODEL_TYPES)})")
        path = Path(path_or_id)
        if not path.exists():
            # config.json is nearly always there: what comes after it is looked for in the same commit only.
            path = hub.fetch(path_or_id, (), ("config.json", *hub.TOKENIZER_FILES), cache_dir=cache_dir)
        wanted = _ALGORITHMS.get(model_type, _WORDPIECE)
        content = _read_folder(path, wanted) if path.is_dir() else _read_file(path, wanted)
        if do_lower_case is None:
            do_lower_case = bool(content.lower_case)
        if content.algorithm != wanted:
            model_type = {_BPE: "roberta", _SENTENCEPIECE: "xlm-roberta"}.get(content.algorithm, model_type)
        return cls(content, model_type, do_lower_case)

    def tokenize(self, text: str) -> list[str]:
        """Split a text into tokens. Special tokens written out in it, such as ``[SEP]``, stay whole.

        ``tokenize`` gives what transformers 2.10 gave: text is lower-cased character by character, and white
        space before a special token and at the end is dropped.
        """
        if self.do_lower_case:
            parts = self._specials.split(text)
            parts[::2] = [_lower(part) for part in parts[::2]]
            text = "".join(parts)
        result: list[str] = []
        for index, part in enumerate(self._specials.split(text)):
            if index % 2:
                result.append(part)
            elif part := part.rstrip():
                result.extend(self._subword.tokenize(part))
        return result

    def tokenize_with_offsets(self, text: str) -> tuple[list[str], list[tuple[int, int]]]:
        """The tokens of :meth:`tokenize`, and the characters of the text that each stands for.

        Returns:
            the tokens, and ``start, end`` of each in the text, end exclusive and without white space around it; they
            are equal where a token stands for no character.
        """
        text_as_read, places = self._as_read(text)
        tokens: list[str] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for index, part in enumerate(self._specials.split(text_as_read)):
            if index % 2:
                found, spans = [part], [(0, len(part))]
            else:
                content = part.rstrip()
                found, spans = self._subword.tokenize_with_offsets(content) if content else ([], [])
            tokens += found
            for first, last in spans:
                end = places[start + last - 1] + 1 if last > first else places[start + first]
                offsets.append(_without_spaces(text, places[start + first], end))
            start += len(part)
        return tokens, offsets

    def _as_read(self, text: str) -> tuple[str, list[int]]:
        """The text in lower case if that is wanted, and where each character and the end are in the text itself."""
        if not self.do_lower_case:
            return text, list(range(len(text) + 1))
        chars: list[str] = []
        places: list[int] = []
        for index, part in enumerate(self._specials.split(text)):
            for char in part:
                chars.append(char if index % 2 else _lower(char))
                places += [len(chars) - 1] * len(chars[-1])
        return "".join(chars), [*places, len(text)]

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens; what the vocabulary lacks becomes ``unk_id``."""
        lookup, unknown = self.vocabulary.get, self.unk_id
        return [lookup(token, unknown) for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Tokens of ids. An id that is out of range, or that a later line's same token took over, is unknown."""
        return [self._token_of(int(index)) for index in ids]

    def _token_of(self, index: int) -> str:
        if 0 <= index < self.vocab_size and self.vocabulary[self.tokens[index]] == index:
            return self.tokens[index]
        return self.unk_token

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens added."""
        return self.convert_tokens_to_ids(self.tokenize(text))

    def detokenize(self, tokens: Sequence[str]) -> str:
        """The line that the original's decoder writes for a sequence of tokens.

        Words are joined by spaces and ``##`` pieces glued to the word before; byte-level and SentencePiece tokens
        are joined by their own rules. A line break in the result becomes `` [X_SEP] ``.
        """
        if isinstance(self._subword, (ByteLevelBpe, SentencePiece, UnigramFile)):
            text = self._subword.join(list(tokens))
        else:
            words: list[str] = []
            for token in tokens:
                if token.startswith("##") and words:
                    words[-1] += token[2:]
                else:
                    words.append(token)
            text = " ".join(words)
        return text.replace("\n", _LINE_BREAK)

    def record(self) -> dict[str, Any]:
        """What identifies this tokenizer in a checkpoint: a hash over all tokens in the order of their ids."""
        digest = hashlib.sha256(json.dumps(self.tokens, ensure_ascii=True).encode())
        return {
            "type": self.model_type,
            "sha256": digest.hexdigest(),
            "vocab_size": self.vocab_size,
            "do_lower_case": self.do_lower_case,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which this class, and transformers, load the tokenizer again."""
        target = Path(folder)
        content = self._content
        if isinstance(content.backend, SentencePiece):
            (target / "sentencepiece.bpe.model").write_bytes(content.backend.model)
        elif isinstance(content.backend, UnigramFile):
            _write_text(target / "tokenizer.json", json.dumps(content.backend.content, ensure_ascii=False))
        elif content.algorithm == _BPE:
            _write_text(target / "vocab.json", json.dumps(self.vocabulary, ensure_ascii=False))
            lines = ["#version: 0.2", *(" ".join(pair) for pair in content.merges)]
            _write_text(target / "merges.txt", "\n".join(lines) + "\n")
        else:
            _write_text(target / "vocab.txt", "\n".join(self.tokens) + "\n")
        settings: dict[str, Any] = {
            "tokenizer_class": _HF_CLASSES[content.algorithm],
            "do_lower_case": self.do_lower_case,
        }
        if content.added:
            settings["additional_special_tokens"] = content.added
        _write_text(target / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _lower(text: str) -> str:
    # One character at a time a capital sigma has no word end to see, so it never becomes a final sigma.
    return text.replace("\N{GREEK CAPITAL LETTER SIGMA}", "\N{GREEK SMALL LETTER SIGMA}").lower()


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _read_folder(folder: Path, wanted: str) -> _Vocabulary:
    files = {
        _WORDPIECE: folder / "vocab.txt",
        _BPE: folder / "vocab.json",
        _SENTENCEPIECE: folder / "sentencepiece.bpe.model",
    }
    whole = folder / "tokenizer.json"
    if files[wanted].is_file():
        content = _read_file(files[wanted], wanted)
    elif whole.is_file():
        content = _read_file(whole, wanted)
    else:
        other = next((kind for kind, file in files.items() if file.is_file()), None)
        if other is None:
            names = ", ".join(file.name for file in (*files.values(), whole))
            raise UserError(f"{folder}: no vocabulary in this folder (looked for {names})")
        content = _read_file(files[other], other)
    _apply_settings(folder, content)
    return content


def _apply_settings(folder: Path, content: _Vocabulary) -> None:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))
    if isinstance(settings.get("do_lower_case"), bool):
        content.lower_case = settings["do_lower_case"]
    if (folder / "added_tokens.json").is_file():
        ids = read_id_map(folder / "added_tokens.json")
        for token, index in sorted(ids.items(), key=lambda item: item[1]):
            if not token:
                raise UserError(f"{folder / 'added_tokens.json'}: an empty token")
            if index == len(content.tokens):
                content.tokens.append(token)
            elif index > len(content.tokens) or content.tokens[index] != token:
                raise UserError(f"{folder / 'added_tokens.json'}: {token!r} has id {index}, which is not the next free")
            content.added.append(token)
    extra = settings.get("additional_special_tokens")
    known = set(content.tokens)
    for token in extra if isinstance(extra, list) else ():
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text and text in known and text not in content.added:
            content.added.append(text)
    standard = _SPECIAL_TOKENS[content.algorithm].values()
    content.added[:] = [token for token in content.added if token not in standard]


def _read_file(path: Path, wanted: str) -> _Vocabulary:
    if path.suffix == ".model":
        return _read_sentencepiece(path)
    if path.suffix == ".json":
        values = read_json(path)
        if isinstance(values.get("model"), Mapping):
            try:
                return _read_tokenizer_json(path, values)
            except (AttributeError, KeyError, TypeError) as error:  # a part is of another kind than it must be
                raise UserError(f"{path}: not a usable tokenizer.json ({type(error).__name__}: {error})") from None
        tokens = _in_order(read_id_map(path), str(path))
        return _Vocabulary(_BPE, tokens, str(path), merges=read_merges(path.with_name("merges.txt")))
    if wanted != _WORDPIECE:
        raise UserError(f"{path}: a WordPiece vocabulary, but the model type asks for {wanted}")
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return _Vocabulary(_WORDPIECE, lines, str(path))


def _read_sentencepiece(path: Path) -> _Vocabulary:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise UserError(f"{path}: the file is empty")
    backend = SentencePiece(data, str(path))
    return _Vocabulary(_SENTENCEPIECE, backend.tokens(), str(path), backend=backend)


def _read_tokenizer_json(path: Path, values: Mapping[str, Any]) -> _Vocabulary:
    model = values["model"]
    kind, vocabulary = model.get("type"), model.get("vocab")
    if kind == "Unigram":
        backend = UnigramFile(values, str(path))
        return _Vocabulary(_SENTENCEPIECE, backend.tokens(), str(path), backend=backend)
    if kind not in ("WordPiece", "BPE") or not isinstance(vocabulary, Mapping):
        raise UserError(f"{path}: a tokenizer of the kind {kind!r} is not supported")
    ids = {str(token): index for token, index in vocabulary.items()}
    for added in values.get("added_tokens") or ():
        ids.setdefault(added["content"], added["id"])
    tokens = _in_order(ids, str(path))
    if kind == "WordPiece":
        return _Vocabulary(_WORDPIECE, tokens, str(path), lower_case=_lowers(values.get("normalizer") or {}))
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges") or ()]
    return _Vocabulary(_BPE, tokens, str(path), merges=pairs)


def _lowers(normalizer: Mapping[str, Any]) -> bool | None:
    """Whether a normalizer of a ``tokenizer.json`` makes text lower case; None if it does not say."""
    parts = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    if any(part.get("type") == "Lowercase" for part in parts):
        return True
    return next((part["lowercase"] for part in parts if isinstance(part.get("lowercase"), bool)), None)


def _in_order(ids: Mapping[str, int], source: str) -> list[str]:
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(f"{source}: the ids of the vocabulary are not 0 to {len(tokens) - 1}, each once")
    return tokens

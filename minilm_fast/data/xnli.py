"""XNLI (arXiv:1809.05053): natural language inference in 15 languages.

Two layouts are known. The original download: ``XNLI-1.0/xnli.dev.tsv`` and ``xnli.test.tsv`` with all languages, and
``XNLI-MT-1.0/multinli/multinli.train.LANG.tsv`` with translated training data, whose contradictions are spelled
``contradictory``. One file a language: ``train-LANG.tsv``, ``dev-LANG.tsv`` and ``test-LANG.tsv`` with the columns
``sentence1``, ``sentence2`` and ``label``. All may be compressed with gzip or xz.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minilm_fast.data.classification import Table, TextExample, label_number
from minilm_fast.data.glue import THREE_WAY
from minilm_fast.errors import UserError

LANGUAGES = ("en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")
"""In the order of MiniLM's table."""
LABELS = THREE_WAY
_SUFFIXES = ("", ".gz", ".xz")
_FIRST, _SECOND, _LABEL = ("sentence1", "premise"), ("sentence2", "hypo", "hypothesis"), ("gold_label", "label")
_PAIRS = Table((_FIRST, _SECOND, _LABEL))
_ALL_LANGUAGES = Table((("language",), _FIRST, _SECOND, _LABEL))
_SPELLINGS = {"contradictory": "contradiction"}


def parse_languages(text: str) -> tuple[str, ...]:
    """``en,fr`` or ``all``, in the order of ``LANGUAGES``.

    Raises:
        UserError: a language is not one of XNLI's.
    """
    if text == "all":
        return LANGUAGES
    wanted = [part.strip() for part in text.split(",")]
    for language in wanted:
        if language not in LANGUAGES:
            raise UserError(f"language {language!r} is not one of XNLI's: {', '.join(LANGUAGES)}")
    return tuple(language for language in LANGUAGES if language in wanted)


def find_split(folder: Path, split: str, language: str) -> tuple[Path, bool] | None:
    """The file of a split.

    Args:
        split: ``"train"``, ``"dev"`` or ``"test"``.

    Returns:
        the file, and whether other languages are in it too; None if there is none.
    """
    own = f"{split}-{language}.tsv"
    if split == "train":
        translated = f"multinli.train.{language}.tsv"
        names = [(own, False), (f"XNLI-MT-1.0/multinli/{translated}", False), (f"multinli/{translated}", False)]
        names.append((translated, False))
    else:
        names = [(own, False), (f"XNLI-1.0/xnli.{split}.tsv", True), (f"xnli.{split}.tsv", True)]
    for name, shared in names:
        for suffix in _SUFFIXES:
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix), shared
    return None


def read_xnli(path: str | Path, language: str | None = None, labels: Sequence[str] = LABELS) -> list[TextExample]:
    """The examples of a file.

    Args:
        language: take those of this language only, by the file's column ``language``.
        labels: in the order of their numbers.

    Raises:
        UserError: the file cannot be read, lacks a column, has another label, or no example.
    """
    found = []
    if language is None:
        rows = _PAIRS.rows(path)
    else:
        rows = ((where, fields[1:]) for where, fields in _ALL_LANGUAGES.rows(path) if fields[0] == language)
    for where, (first, second, label) in rows:
        number = label_number(_SPELLINGS.get(label, label), labels, where)
        found.append(TextExample((first, second), number))
    if not found:
        raise UserError(f"{path} holds no examples" + (f" in the language {language!r}" if language else ""))
    return found

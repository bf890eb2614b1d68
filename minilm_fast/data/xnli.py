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
from minilm_fast.data.glue import THREE_WAY, UNDECIDED, warn_of_undecided
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


def find_train(folder: Path, language: str) -> Path:
    """The training data in a language.

    Raises:
        UserError: there is none.
    """
    translated = f"multinli.train.{language}.tsv"
    names = (f"train-{language}.tsv", f"XNLI-MT-1.0/multinli/{translated}", f"multinli/{translated}", translated)
    found = _find(folder, *names)
    if found is None:
        raise UserError(f"{folder}: no training data in {language!r}: neither {names[0]} nor {names[1]}")
    return found


def read_xnli(path: str | Path, labels: Sequence[str] = LABELS, *, training: bool = False) -> list[TextExample]:
    """The examples of a file that holds one language.

    Args:
        labels: in the order of their numbers.
        training: pairs without a decided label (``-``), which MNLI and SNLI have, are passed over with a warning.

    Raises:
        UserError: the file cannot be read, lacks a column, has another label, or no example.
    """
    found, undecided = [], 0
    for where, fields in _PAIRS.rows(path):
        if training and fields[-1] == UNDECIDED:
            undecided += 1
        else:
            found.append(_example(fields, labels, where))
    if not found:
        raise UserError(f"{path} holds no examples")
    warn_of_undecided(path, undecided)
    return found


def read_split(
    folder: Path, split: str, languages: Sequence[str], labels: Sequence[str] = LABELS
) -> dict[str, list[TextExample]]:
    """The examples of a split by language; a language of which there is no file is left out.

    Args:
        split: ``"dev"`` or ``"test"``.
        labels: in the order of their numbers.

    Raises:
        UserError: as for :func:`read_xnli`; or a file with all languages lacks one.
    """
    own = {language: _find(folder, f"{split}-{language}.tsv") for language in languages}
    found = {language: read_xnli(path, labels) for language, path in own.items() if path is not None}
    others = [language for language in languages if language not in found]
    path = _find(folder, f"XNLI-1.0/xnli.{split}.tsv", f"xnli.{split}.tsv")
    if others and path is not None:
        shared: dict[str, list[TextExample]] = {language: [] for language in others}
        for where, (language, *fields) in _ALL_LANGUAGES.rows(path):
            if language not in LANGUAGES:
                raise UserError(f"{where}: language {language!r} is not one of XNLI's")
            if language in shared:
                shared[language].append(_example(fields, labels, where))
        for language, examples in shared.items():
            if not examples:
                raise UserError(f"{path} holds no examples in {language!r}")
        found |= shared
    return {language: found[language] for language in languages if language in found}


def _find(folder: Path, *names: str) -> Path | None:
    paths = (folder / (name + suffix) for name in names for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _example(fields: list[str], labels: Sequence[str], where: str) -> TextExample:
    first, second, label = fields
    return TextExample((first, second), label_number(_SPELLINGS.get(label, label), labels, where))

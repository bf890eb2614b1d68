"""METEOR 1.5 (Denkowski and Lavie, 2014), by its Java program."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from minilm_fast.errors import UserError
from minilm_fast.metrics.rouge_scores import check_examples

METEORS = {
    "none": "left out",
    "pycocoevalcap": "METEOR 1.5 (Java, through pycocoevalcap), -l en -norm",
}
_SEPARATOR = "|||"
_UTF8 = "-Dfile.encoding=UTF-8"


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 in percent, by the Java program that pycocoevalcap brings along; it takes about 2 GB of memory.

    Args:
        predictions: tokenised texts; empty ones score 0.
        references: one or more an item.

    Raises:
        ValueError: no items, unequal numbers, an item without a reference.
        UserError: pycocoevalcap or Java is missing, or the program fails.
    """
    check_examples(predictions, references)
    scorer = _start()
    gold = {number: [_plain(text) for text in texts] for number, texts in enumerate(references)}
    try:
        score, _ = scorer.compute_score(gold, {number: [_plain(text)] for number, text in enumerate(predictions)})
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            scorer.meteor_p.kill()
        lines = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise UserError(f"METEOR's program failed: {lines[-1] if lines else 'it said nothing'}") from None
    return 100 * float(score)


def _start() -> Any:
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        raise UserError("METEOR 1.5 needs pycocoevalcap: pip install pycocoevalcap") from None
    if shutil.which("java") is None:
        raise UserError("METEOR 1.5 needs Java: there is no program 'java'")
    with _java_in_utf8():
        return Meteor()


@contextlib.contextmanager
def _java_in_utf8() -> Iterator[None]:
    """Java before version 18 reads its input in the encoding of the locale."""
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = _UTF8 if before is None else f"{before} {_UTF8}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before


def _plain(text: str) -> str:
    """On one line and without the mark that separates fields, as the program's protocol wants it."""
    return " ".join(text.replace(_SEPARATOR, " ").split())

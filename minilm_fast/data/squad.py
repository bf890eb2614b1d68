"""Questions about paragraphs, from files in SQuAD's JSON format: SQuAD 1.1 and 2.0, MLQA, XQuAD.

``{"data": [{"paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ..., "answers": [{"text": ...,
"answer_start": ...}]}]}]}]}``; SQuAD 2.0 adds ``is_impossible`` to a question. Files may be compressed with gzip or xz.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm_fast.data.examples import opened
from minilm_fast.errors import UserError

# Files of MLQA name the language of the context, in which answers are, and that of the question.
_MLQA_NAME = re.compile(r"context-([a-z]+)-question-([a-z]+)")
_XQUAD_NAME = re.compile(r"xquad\.([a-z]{2})\b")


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and where in the context it begins: a number of characters."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: of the file.
        answers: all that are right, none where ``is_impossible``.
        where: its place in the file, for messages.
    """

    id: str
    text: str
    answers: tuple[Answer, ...]
    is_impossible: bool
    where: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A context and the questions about it; ``where`` is its place in the file."""

    context: str
    questions: tuple[Question, ...]
    where: str


def read_squad(path: str | Path, *, with_answers: bool = False) -> list[Paragraph]:
    """The paragraphs of a file that have questions.

    Args:
        with_answers: whether ``answers`` must be there, for training and for scoring.

    Raises:
        UserError: the file cannot be read, is no JSON of this format, has no question, or an id twice; names the file
            and the place in it.
    """
    entries = _list(_object(parse_json(path), str(path)), "data", str(path))
    paragraphs = []
    for number, entry in enumerate(entries):
        where = f"{path}: data[{number}]"
        for place, paragraph in enumerate(_list(_object(entry, where), "paragraphs", where)):
            found = _paragraph(paragraph, f"{where}.paragraphs[{place}]", with_answers)
            if found.questions:
                paragraphs.append(found)
    _check_ids(path, paragraphs)
    return paragraphs


def gold_answers(paragraphs: Sequence[Paragraph]) -> dict[str, list[str]]:
    """Question id -> the texts of its answers, none where there is no answer."""
    return {
        question.id: [answer.text for answer in question.answers]
        for paragraph in paragraphs
        for question in paragraph.questions
    }


def language_of(path: str | Path) -> str | None:
    """The language of the answers where the name of the file is one of MLQA's, ``*-context-LL-question-LL*``."""
    match = _MLQA_NAME.search(Path(path).name)
    return match[1] if match else None


def set_names(paths: Sequence[Path]) -> list[str]:
    """What tells files apart: the language in the names of MLQA and XQuAD if that suffices, else the name's start."""

    def language(path: Path) -> str | None:
        match = _XQUAD_NAME.match(path.name)
        return match[1] if match else language_of(path)

    stems = [re.sub(r"(\.json)?(\.gz|\.xz)?$", "", path.name) for path in paths]
    names = [language(path) or stem for path, stem in zip(paths, stems, strict=True)]
    for candidates in (names, stems):
        if len(set(candidates)) == len(paths):
            return candidates
    return [f"{stem}-{number}" for number, stem in enumerate(stems)]


def parse_json(path: str | Path) -> Any:
    """What a JSON file holds, plain, gzip or xz.

    Raises:
        UserError: it cannot be read, is cut off or is no JSON; names line and column.
    """
    with opened(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        reason = "it is cut off" if error.pos >= len(text.rstrip()) else error.msg
        raise UserError(f"{path}: broken JSON ({reason} at {place})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error})") from None


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return value


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise UserError(f"{where}: no {name!r}")
    return record[name]


def _list(record: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = _field(record, name, where)
    if not isinstance(value, list):
        raise UserError(f"{where}.{name}: not a list")
    return value


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}.{name}: not a text")
    # Half a surrogate pair is no character; one for one, so that offsets stay as they are.
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


def _paragraph(value: Any, where: str, with_answers: bool) -> Paragraph:
    record = _object(value, where)
    context = _text(record, "context", where)
    questions = tuple(
        _question(question, f"{where}.qas[{number}]", with_answers)
        for number, question in enumerate(_list(record, "qas", where))
    )
    if questions and not context.strip():
        raise UserError(f"{where}: the context has no words")
    return Paragraph(context, questions, where)


def _question(value: Any, where: str, with_answers: bool) -> Question:
    record = _object(value, where)
    name, text = _field(record, "id", where), _text(record, "question", where)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise UserError(f"{where}.id: not a text")
    impossible = record.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise UserError(f"{where}.is_impossible: not true or false")
    answers: tuple[Answer, ...] = ()
    if not impossible and (with_answers or "answers" in record):
        listed = _list(record, "answers", where)
        answers = tuple(_answer(answer, f"{where}.answers[{number}]") for number, answer in enumerate(listed))
    return Question(str(name), text, answers, impossible, where)


def _answer(value: Any, where: str) -> Answer:
    record = _object(value, where)
    start = record.get("answer_start", 0)
    if not isinstance(start, int) or isinstance(start, bool):
        raise UserError(f"{where}.answer_start: not an integer")
    return Answer(_text(record, "text", where), start)


def _check_ids(path: str | Path, paragraphs: Sequence[Paragraph]) -> None:
    seen: set[str] = set()
    for paragraph in paragraphs:
        for question in paragraph.questions:
            if question.id in seen:
                raise UserError(f"{question.where}: the id {question.id} comes twice in the file")
            seen.add(question.id)
    if not seen:
        raise UserError(f"{path} holds no questions")

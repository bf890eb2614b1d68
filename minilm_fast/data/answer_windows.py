"""Questions with a part of their context each: what a model that extracts answers reads.

A context longer than the model is cut into overlapping windows (BERT, arXiv 1810.04805; ``run_squad`` of transformers).
Words between white space are tokenised one by one, as that script does, and every token knows its characters in the
context, so that answers are exact parts of it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilm_fast.config import ROBERTA_TYPES
from minilm_fast.data.parallel import ordered_map
from minilm_fast.data.squad import Answer, Paragraph, Question
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer

# White space of the script: other space characters are left to the tokenizer.
_WORD = re.compile("[^ \t\r\n\u202f]+")
_CACHED_WORDS = 1 << 18
_PARAGRAPHS_PER_TASK = 32
_MESSAGES = 3


@dataclass(frozen=True)
class WindowOptions:
    """How windows are cut; the names are those of the command line's flags.

    Args:
        max_seq_length: tokens of a window, special ones included.
        doc_stride: tokens of the context between the starts of two windows.
        max_query_length: longer questions are cut to so many tokens.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64


@dataclass(frozen=True, slots=True)
class Context:
    """A tokenised context.

    Attributes:
        ids: int32 ``[tokens]``.
        offsets: int32 ``[tokens, 2]``, start and end of each token in ``text``; equal where it has no character.
    """

    text: str
    ids: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, slots=True)
class Window:
    """``[CLS] question [SEP] part of the context [SEP]``, as the family writes it.

    Attributes:
        question: number of the question in the file.
        prefix: int32, all tokens before the context.
        start, length: the part of the context, in tokens.
        span: first and last token of the answer, counted from the window's first; ``(0, 0)`` if it is not in here.
        suffix: the token after the context.
        context_type: token type of context and suffix.
    """

    question: int
    prefix: np.ndarray
    context: Context
    start: int
    length: int
    span: tuple[int, int]
    suffix: int
    context_type: int

    def __len__(self) -> int:
        return len(self.prefix) + self.length + 1

    def input_ids(self) -> np.ndarray:
        """int32 ``[tokens]``."""
        part = self.context.ids[self.start : self.start + self.length]
        return np.concatenate([self.prefix, part, np.array([self.suffix], dtype=np.int32)])

    def token_type_ids(self) -> np.ndarray:
        """int32 ``[tokens]``."""
        return np.repeat(np.array([0, self.context_type], dtype=np.int32), [len(self.prefix), self.length + 1])


def make_windows(
    paragraphs: Sequence[Paragraph],
    tokenizer: Tokenizer,
    options: WindowOptions,
    *,
    training: bool,
    threads: int = 1,
    name: str = "",
) -> list[Window]:
    """Windows of all questions, in the order of the file.

    Args:
        training: mark the first answer of each question. Questions whose answer is not where the file says are left
            out, and a warning counts them.
        threads: processes that tokenise.
        name: of the file, for messages.

    Raises:
        UserError: a window is too small for a question, ``doc_stride`` passes over a part of the context, a context
            has no words, or no question is left.
    """
    maker = WindowMaker(tokenizer, options, training)
    windows: list[Window] = []
    left_out: list[str] = []
    for found, problems in ordered_map(maker, _tasks(paragraphs), threads, name):
        windows += found
        left_out += problems
    if left_out:
        shown = "; ".join(left_out[:_MESSAGES]) + ("; ..." if len(left_out) > _MESSAGES else "")
        message = f"{len(left_out)} questions are left out, whose answer is not where the file says: {shown}"
        if not windows:
            raise UserError(f"{name}: there is nothing to train on: {message}")
        warnings.warn(message, stacklevel=2)
    return windows


def _tasks(paragraphs: Sequence[Paragraph]) -> Iterator[tuple[int, Sequence[Paragraph]]]:
    number = 0
    for start in range(0, len(paragraphs), _PARAGRAPHS_PER_TASK):
        task = paragraphs[start : start + _PARAGRAPHS_PER_TASK]
        yield number, task
        number += sum(len(paragraph.questions) for paragraph in task)


class WindowMaker:
    """Makes windows of paragraphs; can be sent to another process.

    Args:
        training: see :func:`make_windows`.
    """

    def __init__(self, tokenizer: Tokenizer, options: WindowOptions, training: bool) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.training = training
        roberta = tokenizer.model_type in ROBERTA_TYPES
        self._between = [tokenizer.sep_id] * (2 if roberta else 1)
        self._context_type = 0 if roberta else 1
        # Byte-level BPE takes the space before a word as a part of it.
        self._space = " " if tokenizer.model_type == "roberta" else ""
        self._word: Callable[[str], tuple[list[int], list[tuple[int, int]]]] = functools.lru_cache(_CACHED_WORDS)(
            self._tokenize_word
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokenizer, self.options, self.training)

    def __call__(self, task: tuple[int, Sequence[Paragraph]]) -> tuple[list[Window], list[str]]:
        """Windows of paragraphs, and messages about the questions that are left out.

        Args:
            task: the number of the first question, and the paragraphs.
        """
        number, paragraphs = task
        windows: list[Window] = []
        left_out: list[str] = []
        for paragraph in paragraphs:
            context = self.context(paragraph)
            for question in paragraph.questions:
                answer = self._answer(question, context)
                if answer is None:
                    left_out.append(f"{question.where} (id {question.id})")
                else:
                    windows += self._windows(question, number, context, answer)
                number += 1
        return windows, left_out

    def context(self, paragraph: Paragraph) -> Context:
        """The tokens of a context.

        Raises:
            UserError: there is none.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for match in _WORD.finditer(paragraph.context):
            start = match.start()
            found, places = self._word(match[0])
            ids += found
            offsets += [(start + first, start + last) for first, last in places]
        if not ids:
            raise UserError(f"{paragraph.where}: the context has no words")
        return Context(paragraph.context, np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32))

    def _tokenize_word(self, word: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokens, offsets = self.tokenizer.tokenize_with_offsets(self._space + word)
        shift = len(self._space)
        places = [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]
        return self.tokenizer.convert_tokens_to_ids(tokens), places

    def _answer(self, question: Question, context: Context) -> tuple[int, int] | None:
        """First and last token of the answer in the context, ``(-1, -1)`` for none, None if it cannot be found."""
        if not self.training or question.is_impossible:
            return -1, -1
        if not question.answers:
            return None
        place = locate(context.text, question.answers[0])
        if place is None:
            return None
        starts, ends = context.offsets.T
        inside = np.flatnonzero((starts < place[1]) & (ends > place[0]))
        if not len(inside):
            return None
        first = int(inside[0])
        # A piece without characters, such as SentencePiece's mark of a word's start, belongs to what follows.
        while first and starts[first - 1] == ends[first - 1] == starts[first]:
            first -= 1
        return first, int(inside[-1])

    def _windows(self, question: Question, number: int, context: Context, answer: tuple[int, int]) -> Iterator[Window]:
        options, tokenizer = self.options, self.tokenizer
        query = tokenizer.encode(question.text)[: options.max_query_length]
        prefix = np.array([tokenizer.cls_id, *query, *self._between], dtype=np.int32)
        room = options.max_seq_length - len(prefix) - 1
        if room < 1:
            raise UserError(
                f"{question.where}: --max_seq_length {options.max_seq_length} leaves no room for the context beside a "
                f"question of {len(query)} tokens (--max_query_length {options.max_query_length})"
            )
        if options.doc_stride > room and len(context.ids) > room:
            raise UserError(
                f"{question.where}: --doc_stride {options.doc_stride} passes over a part of the context, of which "
                f"{room} tokens fit into a window (--max_seq_length {options.max_seq_length})"
            )
        start = 0
        while True:
            length = min(room, len(context.ids) - start)
            inside = start <= answer[0] and answer[1] < start + length
            shift = len(prefix) - start
            span = (answer[0] + shift, answer[1] + shift) if inside else (0, 0)
            yield Window(number, prefix, context, start, length, span, tokenizer.sep_id, self._context_type)
            if start + length == len(context.ids):
                return
            start += options.doc_stride


def locate(context: str, answer: Answer) -> tuple[int, int] | None:
    """Start and end of an answer in its context, or None where it is not.

    As in the script, it need not begin at the very character that the file says, but must lie in the words from there
    on, whatever the white space in it.
    """
    start, end = answer.start, answer.start + len(answer.text)
    if answer.text.strip() == answer.text != "" and start >= 0 and context[start:end] == answer.text:
        return start, end
    words = answer.text.split()
    if not words or not 0 <= start < len(context):
        return None
    last = min(end, len(context)) - 1
    region = [match.span() for match in _WORD.finditer(context) if match.end() > start and match.start() <= last]
    if not region:
        return None
    pattern = re.compile(r"\s+".join(map(re.escape, words)))
    found = pattern.search(context, region[0][0], region[-1][1])
    return found.span() if found else None

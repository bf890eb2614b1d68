"""Start and end of an answer, scored for every token; ``...ForQuestionAnswering`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.data.answer_windows import Window, WindowOptions, make_windows
from minilm_fast.data.squad import Paragraph, Question
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.answers import AnswerOptions, Prediction, choose_answers
from minilm_fast.modeling.heads import HeadInput, HeadModel

_LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")


@dataclass(frozen=True)
class QuestionAnsweringBatch:
    """Packed windows.

    Attributes:
        tokens: the windows, and after them perhaps one idle sequence.
        token_type_ids: int32 ``[tokens]``.
        spans: int64 ``[windows, 2]``, first and last token of the answer, counted from the window's first.
        rows: number of the windows' tokens.
    """

    tokens: TokenBatch
    token_type_ids: Tensor
    spans: Tensor
    rows: int

    @classmethod
    def collate(cls, windows: Sequence[Window], multiple: int = 1) -> QuestionAnsweringBatch:
        """Packs windows.

        Args:
            multiple: the number of tokens becomes a multiple of it, by an idle sequence of token 0; see
                :func:`minilm_fast.data.batching.collate`.
        """
        sequences = [window.input_ids() for window in windows]
        types = [window.token_type_ids() for window in windows]
        rows = sum(map(len, sequences))
        if rows % multiple:
            idle = np.zeros(-rows % multiple, dtype=np.int32)
            sequences.append(idle)
            types.append(idle)
        return cls(
            tokens=TokenBatch.from_sequences(sequences),
            token_type_ids=torch.from_numpy(np.concatenate(types)),
            spans=torch.tensor([window.span for window in windows]),
            rows=rows,
        )

    def to(self, device: torch.device | str) -> QuestionAnsweringBatch:
        """The same batch on a device."""
        types, spans = (x.to(device, non_blocking=True) for x in (self.token_type_ids, self.spans))
        return replace(self, tokens=self.tokens.to(device), token_type_ids=types, spans=spans)


class QuestionAnswerer(HeadModel):
    """A linear layer with two outputs on every token (BERT, arXiv 1810.04805, section 4.2).

    Logits, of the start and of the end, are ``[tokens, 2]`` for a packed batch and ``[batch, length, 2]`` for a padded
    one, there 0 at padding.
    """

    suffix = "ForQuestionAnswering"
    labelled = False

    def __init__(self, config: Config) -> None:
        # Labels of another task would be taken for the outputs of this head.
        super().__init__(config.replace(extra={k: v for k, v in config.extra.items() if k not in _LABEL_KEYS}))

    def build(self, config: Config) -> None:
        """See :class:`HeadModel`."""
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def head(self, hidden: Tensor, batch: HeadInput) -> Tensor:
        """See :class:`HeadModel`."""
        return batch.spread(self.qa_outputs(hidden))

    @overload
    def predict(
        self, questions: str, contexts: str, *, batch_size: int = ..., dtype: str = ..., **options: Any
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        questions: Sequence[str],
        contexts: str | Sequence[str],
        *,
        batch_size: int = ...,
        dtype: str = ...,
        **options: Any,
    ) -> list[Prediction]: ...

    def predict(
        self,
        questions: str | Sequence[str],
        contexts: str | Sequence[str],
        *,
        batch_size: int = 32,
        dtype: str = "fp32",
        **options: Any,
    ) -> Any:
        """Finds answers in contexts, where the model is: on a CPU or a GPU.

        Args:
            questions: one, or several.
            contexts: one for each question, or a text that all questions are about.
            batch_size: windows computed together; changes nothing but the speed.
            dtype: ``"fp32"``, ``"bf16"``, on a CPU ``"int8"`` or on a GPU ``"fp16"`` weights of the linear layers, see
                :meth:`HeadModel.packed`.
            **options: fields of :class:`~minilm_fast.data.answer_windows.WindowOptions` and
                :class:`~minilm_fast.modeling.answers.AnswerOptions`; windows have at most as many tokens as the model
                has positions.

        Returns:
            a :class:`~minilm_fast.modeling.answers.Prediction`, of several questions a list of them in their order.

        Raises:
            TypeError: an option is unknown.
            UserError: an argument is out of range, or the model has no tokenizer.
        """
        if isinstance(questions, str):
            return self.predict([questions], contexts, batch_size=batch_size, dtype=dtype, **options)[0]
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        of_answers = {name: options.pop(name) for name in AnswerOptions.__dataclass_fields__ if name in options}
        windows = self._windows(_paragraphs(questions, contexts), WindowOptions(**options), "max_seq_length" in options)
        packed, logits = self.packed(dtype), []
        for start in range(0, len(windows), batch_size):
            batch = QuestionAnsweringBatch.collate(windows[start : start + batch_size])
            ends = batch.tokens.layout.cu_seqlens[1:-1].numpy()
            batch = batch.to(self.device)
            logits += np.split(packed(batch.tokens, token_type_ids=batch.token_type_ids).cpu().numpy(), ends)
        return list(choose_answers(windows, logits, AnswerOptions(**of_answers)).values())

    def _windows(self, paragraphs: Sequence[Paragraph], options: WindowOptions, exact: bool) -> list[Window]:
        positions = self.config.max_position_embeddings
        if options.max_seq_length > positions:
            if exact:
                raise UserError(f"max_seq_length {options.max_seq_length}: the model has {positions} positions")
            options = replace(options, max_seq_length=positions)
        return make_windows(paragraphs, self.tokenizer, options, training=False)

    def span_logits(self, batch: QuestionAnsweringBatch) -> Tensor:
        """Logits ``[batch.rows, 2]`` of the windows' tokens."""
        logits: Tensor = self(batch.tokens, token_type_ids=batch.token_type_ids)
        return logits[: batch.rows]


def _paragraphs(questions: Sequence[str], contexts: str | Sequence[str]) -> list[Paragraph]:
    """A paragraph for the questions that follow one another and have one context."""
    texts = [contexts] * len(questions) if isinstance(contexts, str) else list(contexts)
    if len(texts) != len(questions):
        raise UserError(f"{len(questions)} questions need as many contexts, or one for all, got {len(texts)}")
    for kind, values in (("question", questions), ("context", texts)):
        wrong = next((place for place, value in enumerate(values) if not isinstance(value, str)), None)
        if wrong is not None:
            raise UserError(f"{kind} {wrong} must be a string, got {type(values[wrong]).__name__}")
    found = []
    for text, group in groupby(enumerate(questions), key=lambda pair: texts[pair[0]]):
        asked = tuple(Question(str(n), question, (), False, f"question {n}") for n, question in group)
        found.append(Paragraph(text, asked, asked[0].where))
    return found


def span_losses(logits: Tensor, batch: QuestionAnsweringBatch) -> Tensor:
    """Mean of the cross-entropies of start and end over the tokens of a window, fp32 ``[windows]``.

    Args:
        logits: ``[batch.rows, 2]``.
    """
    windows, layout = len(batch.spans), batch.tokens.layout
    starts = layout.cu_seqlens[: windows + 1].long()
    numbers = torch.arange(windows, device=logits.device)
    owner = torch.repeat_interleave(numbers, starts.diff(), output_size=batch.rows)
    scores = logits.float()
    padded = scores.new_full((windows, layout.max_seqlen, 2), -torch.inf)
    padded = padded.index_put((owner, batch.tokens.position_ids[: batch.rows].long()), scores)
    right = scores[starts[:-1, None] + batch.spans, torch.arange(2, device=logits.device)]
    return (padded.logsumexp(1) - right).mean(1)

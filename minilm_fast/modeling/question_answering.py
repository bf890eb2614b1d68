"""Start and end of an answer, scored for every token; ``...ForQuestionAnswering`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from minilm_fast.config import Config
from minilm_fast.data.answer_windows import Window
from minilm_fast.data.token_batch import TokenBatch
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

    def span_logits(self, batch: QuestionAnsweringBatch) -> Tensor:
        """Logits ``[batch.rows, 2]`` of the windows' tokens."""
        logits: Tensor = self(batch.tokens, token_type_ids=batch.token_type_ids)
        return logits[: batch.rows]


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

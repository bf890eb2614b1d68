"""N-gram blocking, and a step of beam search but for the model.

``ban_repeated_ngrams``: the tokens that would complete an n-gram which a sequence already holds. The tail is the
last ``n - 1`` tokens (for ``n = 1`` the whole sequence, as in the original); if one of them is ignored, nothing is
banned, and an ignored token never is.

``advance_beams``: what follows the candidates in a step, in place. For each example that runs, the best ``B`` of the
``B x B`` candidates by ``candidate score + hypothesis score + (-10000 if the hypothesis has ended)``; tokens and
ancestry in the order of their parents; the new tokens; the best ended hypothesis; and whether the example has its
answer. The rules are those of ``docs/decoding.md``, in fp64 where scores are divided or compared between frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minilm_fast.ops import _cuda, reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define


class BeamState(NamedTuple):
    """What a search knows of its examples, a row each: ``R`` rows, ``B`` beams, ``T`` frames.

    Attributes:
        running: bool ``[R]``: has no answer yet. The other rows stand still.
        frame: int32 ``[R]``: how many tokens each hypothesis has.
        steps: int32 ``[R]``: how many entries the history has; 0 once the row stands still.
        scores: fp32 ``[R, B]``: sums of log-probabilities.
        last_ids: int32 ``[R, B]``: last token of each hypothesis.
        tokens: int32 ``[R, B, T]``.
        ancestry: int32 ``[R, B, S]``: see :func:`minilm_fast.ops.decode_attention`.
        best_score: fp64 ``[R]``: of the best hypothesis that has ended, by its length where that counts, else ``-inf``.
        best_tokens, best_length: int32 ``[R, T]`` and ``[R]``: that hypothesis.
        all_ended: int32 ``[R]``: the first frame in which all hypotheses had ended, or -1.
        lengths: int32 ``[R, B]``: ``frame``, for each hypothesis.
        suppress: bool ``[R, B]``: whether the next token may not be the end.
        trace_scores, trace_ids, trace_parents: fp32, int32, int32 ``[R, T or 0, B]``: what each frame chose.
    """

    running: torch.Tensor
    frame: torch.Tensor
    steps: torch.Tensor
    scores: torch.Tensor
    last_ids: torch.Tensor
    tokens: torch.Tensor
    ancestry: torch.Tensor
    best_score: torch.Tensor
    best_tokens: torch.Tensor
    best_length: torch.Tensor
    all_ended: torch.Tensor
    lengths: torch.Tensor
    suppress: torch.Tensor
    trace_scores: torch.Tensor
    trace_ids: torch.Tensor
    trace_parents: torch.Tensor


class BeamRules(NamedTuple):
    """What a search goes by.

    Attributes:
        divisors: fp64 ``[T]``: what a score is divided by if it ends in a frame; never falling.
        sep, pad: the token that ends a hypothesis, and the one that ends greedy search as well.
        min_len: the end is held off in so many frames.
        early_exit: an example stops when no live hypothesis can win any more.
    """

    divisors: torch.Tensor
    sep: int
    pad: int
    min_len: int
    early_exit: bool


_ban_op = define(
    "ban_repeated_ngrams(Tensor tokens, Tensor lengths, int n, Tensor ignored) -> Tensor",
    reference=reference.ban_repeated_ngrams,
    fake=lambda tokens, *_: tokens.new_empty(tokens.shape),
)
_advance_op = define(
    "advance_beams(Tensor candidate_scores, Tensor candidate_ids, Tensor? rows, Tensor divisors, "
    + ", ".join(f"Tensor({letter}!) {name}" for letter, name in zip("abcdefghijklmnop", BeamState._fields, strict=True))
    + ", int sep, int pad, int min_len, bool early_exit, int entering) -> ()",
    reference=reference.advance_beams,
    fake=lambda *_: None,
)


def ban_repeated_ngrams(tokens: torch.Tensor, lengths: torch.Tensor, n: int, ignored: torch.Tensor) -> torch.Tensor:
    """Tokens that would repeat an n-gram (module docstring).

    Args:
        tokens: int32 ``[rows, T]``.
        lengths: int32 ``[rows]``: how many tokens of each row there are yet.
        n: size of the n-grams, at least 1.
        ignored: int32 ``[I]``.

    Returns:
        int32 ``[rows, T]``: the banned ids of each row, then -1.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or ``n < 1``.
    """
    if select("ban_repeated_ngrams", tokens) == "reference":
        return reference.ban_repeated_ngrams(tokens, lengths, n, ignored)
    return _ban_op(tokens, lengths, n, ignored)


def advance_beams(
    candidate_scores: torch.Tensor,
    candidate_ids: torch.Tensor,
    state: BeamState,
    rules: BeamRules,
    *,
    rows: torch.Tensor | None = None,
    entering: int = -1,
) -> None:
    """One step of the search in place (module docstring).

    Args:
        candidate_scores: fp32 ``[E, B, B]``, log-probabilities, descending in the last dimension; of examples that
            enter ``[E, 1, B]``.
        candidate_ids: int32, the same shape.
        state: changed in the rows that run, or that enter; what lies beyond a frame or a step stays as it is.
        rules: what the search goes by. With one beam, ended hypotheses are not told apart: the first end is the answer.
        rows: int32 ``[E]``: the row of each example, no two the same; by default row ``e`` is that of example ``e``.
        entering: of examples that take their first step, the number of history entries that they have already (0, or
            1 with position shift); -1: a later step.

    Of equal totals the candidate with the lower index ``b * B + k`` comes first.

    Raises:
        RuntimeError: a shape or dtype does not fit, or, on a CPU, a row, frame or step is out of range; the message
            names the argument.
    """
    args = (candidate_scores, candidate_ids, rows, rules.divisors, *state, *rules[1:], entering)
    refusals = _cuda.refuse_beams(state.tokens.shape[1])
    if select("advance_beams", state.tokens, refusals=refusals) == "reference":
        reference.advance_beams(*args)
    else:
        _advance_op(*args)

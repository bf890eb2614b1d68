"""N-gram blocking and the choice of the next beams.

``ban_repeated_ngrams``: the tokens that would complete an n-gram which a sequence already holds. The tail is the
last ``n - 1`` tokens (for ``n = 1`` the whole sequence, as in the original); if one of them is ignored, nothing is
banned, and an ignored token never is.

``beam_step``: ``top-K`` over the ``B x K`` candidates of an example of
``candidate score + hypothesis score + (-10000 if the hypothesis has ended)``.
"""

from __future__ import annotations

import torch

from minilm_fast.ops import reference
from minilm_fast.ops._dispatch import select
from minilm_fast.ops._library import define


def _beam_fake(
    candidate_scores: torch.Tensor, candidate_ids: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (candidate_scores.shape[0], candidate_scores.shape[2])
    return (
        candidate_scores.new_empty(shape),
        candidate_ids.new_empty(shape),
        candidate_ids.new_empty(shape),
    )


_ban_op = define(
    "ban_repeated_ngrams(Tensor tokens, Tensor lengths, int n, Tensor ignored) -> Tensor",
    reference=reference.ban_repeated_ngrams,
    fake=lambda tokens, *_: tokens.new_empty(tokens.shape),
)
_beam_op = define(
    "beam_step(Tensor candidate_scores, Tensor candidate_ids, Tensor scores, Tensor last_ids, int eos) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.beam_step,
    fake=_beam_fake,
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


def beam_step(
    candidate_scores: torch.Tensor,
    candidate_ids: torch.Tensor,
    scores: torch.Tensor,
    last_ids: torch.Tensor,
    eos: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chooses the next ``K`` hypotheses of each example (module docstring).

    Args:
        candidate_scores: fp32 ``[E, B, K]``, log-probabilities, descending in the last dimension.
        candidate_ids: int32 ``[E, B, K]``.
        scores: fp32 ``[E, B]``, sums so far.
        last_ids: int32 ``[E, B]``, last token of each hypothesis.
        eos: the token that ends a hypothesis.

    Returns:
        ``(scores fp32, ids int32, parents int32)``, each ``[E, K]``, by descending score; of equal scores the
        candidate with the lower index ``b * K + k`` comes first.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    if select("beam_step", candidate_scores) == "reference":
        return reference.beam_step(candidate_scores, candidate_ids, scores, last_ids, eos)
    return _beam_op(candidate_scores, candidate_ids, scores, last_ids, eos)

"""BLEU-4, METEOR and ROUGE-L of generated questions, as the scripts of Du et al. (2017) and UniLM compute them.

Both scripts are COCO's caption evaluation: what has the same key is one item, its references count together, and of
its predictions the last one counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from minilm_fast.metrics.meteor_score import METEORS, meteor
from minilm_fast.metrics.requirements import missing
from minilm_fast.metrics.rouge_scores import check_examples

BETA = 1.2


def question_generation(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    keys: Sequence[Hashable] | None = None,
    meteor_implementation: str = "none",
) -> dict[str, float]:
    """Scores of tokenised questions; texts are split at white space and compared as they are.

    Args:
        predictions: one an example; empty ones score 0.
        references: one or more an example.
        keys: examples with equal keys become one item (:func:`pool`); None: every example is an item.
        meteor_implementation: ``none`` or ``pycocoevalcap``, see :func:`minilm_fast.metrics.meteor`.

    Returns:
        In percent: ``bleu1`` to ``bleu4``, ``rougeL``, ``meteor`` if asked for; ``items``, their number.

    Raises:
        ValueError: no examples, unequal numbers, an example without a reference, an unknown implementation.
        UserError: a package or Java is missing.
    """
    if meteor_implementation not in METEORS:
        raise ValueError(f"METEOR implementations are {', '.join(METEORS)}, not {meteor_implementation!r}")
    if keys is not None:
        predictions, references = pool(predictions, references, keys)
    scores = bleu(predictions, references)
    found = {name: scores[name] for name in ("bleu1", "bleu2", "bleu3", "bleu4")}
    if meteor_implementation != "none":
        found["meteor"] = meteor(predictions, references)
    found["rougeL"] = coco_rouge_l(predictions, references)
    return {**found, "items": len(predictions)}


def pool(
    predictions: Sequence[str], references: Sequence[Sequence[str]], keys: Sequence[Hashable]
) -> tuple[list[str], list[list[str]]]:
    """One item a key, in the order of first occurrence: all references of the key, and its last prediction.

    Raises:
        ValueError: not as many keys as examples; otherwise as :func:`question_generation`.
    """
    check_examples(predictions, references)
    if len(keys) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions, {len(keys)} keys")
    last: dict[Hashable, str] = {}
    pooled: dict[Hashable, list[str]] = {}
    for key, prediction, texts in zip(keys, predictions, references, strict=True):
        last[key] = prediction
        pooled.setdefault(key, []).extend(texts)
    return list(last.values()), list(pooled.values())


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al., 2002), not smoothed; the closest reference's length decides the brevity penalty.

    Args:
        predictions, references: tokenised texts, as for :func:`question_generation`.

    Returns:
        ``bleu1`` to ``bleu4`` (geometric mean of the precisions up to that order, with the penalty) in percent,
        ``brevity_penalty`` and ``length_ratio``.

    Raises:
        ValueError: no examples, unequal numbers, an example without a reference.
        UserError: sacrebleu is not installed.
    """
    check_examples(predictions, references)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise missing("sacrebleu") from None

    most = max(map(len, references))
    # A place that an example has no reference for is None.
    streams: Any = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    found: dict[str, float] = {}
    for order in range(1, 5):
        metric = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
        score = metric.corpus_score(list(predictions), streams)
        found[f"bleu{order}"] = score.score
    return {**found, "brevity_penalty": score.bp, "length_ratio": score.sys_len / max(1, score.ref_len)}


def coco_rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of COCO's caption evaluation, in percent: of each item the best precision and the best recall over the
    references, which need not be of the same one, joined with beta 1.2; then the mean.

    Args:
        predictions, references: tokenised texts, as for :func:`question_generation`.

    Raises:
        ValueError: no examples, unequal numbers, an example without a reference.
    """
    check_examples(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(_rouge_l(prediction.split(), texts) for prediction, texts in pairs) / len(predictions)


def _rouge_l(words: Sequence[str], references: Sequence[str]) -> float:
    split = [text.split() for text in references]
    common = [_longest_common_subsequence(words, reference) for reference in split]
    precision = max(common) / max(1, len(words))
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, split, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]

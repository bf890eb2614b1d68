"""The tasks of the paper's tables: how texts are prepared, what is computed, and which score chooses a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from minilm_fast.metrics import normalize
from minilm_fast.metrics.questions import question_generation
from minilm_fast.metrics.rouge_scores import rouge

SUMMARIES, QUESTIONS = "summaries", "questions"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: ``SUMMARIES`` (ROUGE) or ``QUESTIONS`` (BLEU-4, METEOR, ROUGE-L).
        best_by: the score that chooses among checkpoints, as in the original's ``--save_best`` (for questions: ours).
        trunc_len: default of ``--trunc_len``, in words; 0 keeps all.
        duplicate_rate: default of ``--duplicate_rate``.
        style: of ``fix_tokenization``.
    """

    kind: str
    best_by: str
    style: normalize.Style
    trunc_len: int = 0
    duplicate_rate: float = 0.0


TASKS = {
    "xsum": Task(SUMMARIES, "rouge2", normalize.XSUM),
    "cnndm": Task(SUMMARIES, "rouge2", normalize.CNNDM, trunc_len=160, duplicate_rate=0.7),
    "gigaword": Task(SUMMARIES, "rouge2", normalize.GIGAWORD),
    "qg": Task(QUESTIONS, "bleu4", normalize.NQG),
}

# How the texts of questions are split: of the predictions, and of the references.
_TOKENIZATIONS: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "nqg": (normalize.nqg_question, str.lower),
    "bert": (normalize.basic_tokens, normalize.basic_tokens),
    "none": (str, str),
}
TOKENIZATIONS = {
    "nqg": "predictions through fix_tokenization and lower-cased (UniLM's qg/eval.py), references as they are",
    "bert": "predictions and references split by BERT's basic tokenizer, lower-cased, accents stripped",
    "none": "predictions and references as they are, split at white space",
}


def summary_prediction(task: str, text: str, trunc_len: int | None = None, duplicate_rate: float | None = None) -> str:
    """A decoded summary as the task's script compares it, one sentence a line.

    Args:
        task: ``xsum``, ``cnndm`` or ``gigaword``.
        text: a line of decoding's output.
        trunc_len: words that are kept, 0 for all; None: the task's default.
        duplicate_rate: see :func:`minilm_fast.metrics.normalize.sentences`; ``cnndm`` only.
    """
    made = find_task(task)
    length = made.trunc_len if trunc_len is None else trunc_len
    if task == "cnndm":
        return normalize.sentences(text, length, made.duplicate_rate if duplicate_rate is None else duplicate_rate)
    return normalize.one_sentence(text, made.style, length)


def summary_reference(task: str, text: str, raw: bool) -> str:
    """A reference summary as the task's script compares it, one sentence a line.

    Args:
        task: as for :func:`summary_prediction`.
        text: the reference.
        raw: it has not been through the tokenisation of the official references, so brackets are yet to be written
            ``-LRB-`` and so on, which are words to ROUGE.
    """
    text = normalize.gold_sentences(text) if task == "cnndm" else " ".join(text.split())
    return normalize.write_brackets(text) if raw and task != "gigaword" else text


def question_texts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenization: str
) -> tuple[list[str], list[list[str]]]:
    """Predicted and reference questions, split and joined with single spaces.

    Args:
        predictions: lines of decoding's output.
        references: one or more an example.
        tokenization: a key of ``TOKENIZATIONS``.

    Raises:
        ValueError: an unknown tokenisation.
    """
    if tokenization not in _TOKENIZATIONS:
        raise ValueError(f"tokenisations are {', '.join(_TOKENIZATIONS)}, not {tokenization!r}")
    predicted, gold = _TOKENIZATIONS[tokenization]
    return (
        [" ".join(predicted(text).split()) for text in predictions],
        [[" ".join(gold(text).split()) for text in texts] for texts in references],
    )


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, not {name!r}")
    return TASKS[name]


def best_metric(task: str) -> str:
    """The score of :func:`generation_scores` that chooses among checkpoints; higher is better.

    Raises:
        ValueError: an unknown task.
    """
    return find_task(task).best_by


def generation_scores(
    task: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    keys: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """The scores that say at each save how good a checkpoint is; no Java, one process.

    Args:
        task: ``xsum``, ``cnndm``, ``gigaword`` or ``qg``.
        predictions: decoded texts, one an example; empty ones score 0.
        references: one or more raw texts an example (``tgt`` of the data file).
        keys: for ``qg``, see :func:`minilm_fast.metrics.question_generation`.

    Returns:
        In percent: F of ``rouge1``, ``rouge2``, ``rougeL`` for summaries; ``bleu4`` and ``rougeL`` for questions, both
        sides split by BERT's basic tokenizer.

    Raises:
        ValueError: no examples, unequal numbers, an example without a reference, an unknown task.
        UserError: a package is missing.
    """
    if find_task(task).kind == QUESTIONS:
        found = question_generation(*question_texts(predictions, references, "bert"), keys=keys)
        return {name: found[name] for name in ("bleu4", "rougeL")}
    prepared = [summary_prediction(task, text) for text in predictions]
    gold = [[summary_reference(task, text, raw=True) for text in texts] for texts in references]
    return {name: score.f for name, score in rouge(prepared, gold).items()}

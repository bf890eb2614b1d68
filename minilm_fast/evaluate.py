"""Score generated texts with the metrics of the paper's tables: ``python -m minilm_fast.evaluate``."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from minilm_fast.cli import ArgumentParser, guarded, leave, say
from minilm_fast.data.parallel import available_cores
from minilm_fast.decoding.output import STANDARD, Destination
from minilm_fast.errors import UserError
from minilm_fast.metrics import METEORS, TASKS, TOKENIZATIONS
from minilm_fast.metrics.files import (
    JSON_LINES,
    QUESTION_FIELDS,
    SUMMARY_FIELDS,
    TEXT,
    find_predictions,
    read_exceptions,
    read_gold,
    read_lines,
)
from minilm_fast.metrics.questions import question_generation
from minilm_fast.metrics.rouge_scores import rouge
from minilm_fast.metrics.selection import only_best, save_best
from minilm_fast.metrics.tasks import QUESTIONS, question_texts, summary_prediction, summary_reference

# What examples that share it are pooled by: the field of the gold file.
POOL_KEYS = {"none": "", "passage": "src", "sentence": "sent_tok"}
_SUMMARY_FLAGS = ("trunc_len", "duplicate_rate", "bootstrap", "wordnet_exceptions")
_QUESTION_FLAGS = ("pool_key", "pool_file", "tokenization", "meteor")
_COLUMNS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "bleu4": "BLEU-4", "meteor": "METEOR", "rougeL": "ROUGE-L"}


@dataclass
class Scores:
    """Of one prediction file, in percent; ``details`` says more of each score, for the JSON output."""

    file: str
    values: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


def build_parser() -> ArgumentParser:
    """The command line; names are those of the original's scripts, ``--task`` says which of them."""
    parser = ArgumentParser(
        prog="minilm_fast.evaluate",
        description="Score generated texts with the metrics of the paper's tables. Several prediction files are scored "
        "side by side and the best one is marked.",
    )
    _add_files(parser.add_argument_group("input and output"))
    _add_summaries(parser.add_argument_group("summaries (xsum, cnndm, gigaword)"))
    _add_questions(parser.add_argument_group("questions (qg)"))
    ignored = parser.add_argument_group("accepted without effect")
    ignored.add_argument("--perl", action="store_true", help="no effect: see --wordnet_exceptions")
    ignored.add_argument("--lazy_eval", action="store_true", help="no effect: files are always scored")
    return parser


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--task", choices=TASKS, required=True, help="what the texts are")
    add("--pred", nargs="+", required=True, help="outputs of decoding, one example a line; may hold * and ?")
    add("--gold", required=True, help="references: plain lines, or JSON lines with 'tgt' (or several in 'refs')")
    add("--gold_format", choices=(TEXT, JSON_LINES), help="default: told by the name or the first character")
    add("--gold_field", help="field of the references (default: 'refs', for questions 'ref_tok', 'tgt')")
    add("--subset", type=_natural, help="compare the first SUBSET lines only, as decoding's --subset")
    add("--json", metavar="FILE", help="write the scores; - for standard output, in place of the table")
    add("--split", default="", help="names the file of --save_best")
    add("--save_best", action="store_true", help="write the best file's name to save_best.SPLIT beside the predictions")
    add("--only_eval_best", action="store_true", help="only the checkpoint that save_best.dev names")
    add("--processes", type=_natural, help="that share the work of ROUGE (default: all cores)")


def _add_summaries(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    lengths = ", ".join(f"{name} {task.trunc_len}" for name, task in TASKS.items() if task.kind != QUESTIONS)
    add("--trunc_len", type=_count, help=f"cut predictions to so many words; 0: all (default: {lengths})")
    add(
        "--duplicate_rate",
        type=_rate,
        help="cnndm: drop a sentence if more than this share of its words came before; 0: none (default: 0.7)",
    )
    add(
        "--wordnet_exceptions",
        metavar="FOLDER",
        help="WordNet's *.exc files: irregular words become their base forms, which makes ROUGE equal to the Perl "
        "script's (default: they are stemmed like others, and scores are lower)",
    )
    add(
        "--bootstrap",
        type=_natural,
        metavar="N",
        help="95 %% confidence intervals from N resamples, as the Perl script's -c 95 -r 1000",
    )


def _add_questions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--pool_key",
        choices=POOL_KEYS,
        help="examples with the same passage and answer ('src') or sentence ('sent_tok') count as one, with all their "
        "references (default: passage where the gold file has 'src')",
    )
    add("--pool_file", metavar="FILE", help="plain lines in place of --pool_key: examples whose lines are equal")
    add(
        "--tokenization",
        choices=TOKENIZATIONS,
        help="nqg: as UniLM's script for Du et al.'s references; bert: both sides split as the model does (default: "
        "nqg for 'ref_tok' and plain lines, else bert)",
    )
    add("--meteor", choices=METEORS, help="pycocoevalcap runs METEOR 1.5, which needs Java (default: none)")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text}")
    return value


class Evaluation:
    """What the command line asks for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.task = TASKS[args.task]
        self._check_flags()
        self.output = Destination(args.json) if args.json else None
        if self.output:
            self.output.check()
        names = find_predictions(args.pred)
        self.names = only_best(names) if args.only_eval_best else names
        fields = QUESTION_FIELDS if self.task.kind == QUESTIONS else SUMMARY_FIELDS
        self.gold = read_gold(args.gold, args.gold_format, [args.gold_field] if args.gold_field else fields)
        if args.gold_field and self.gold.field is None:
            raise UserError(f"--gold_field {args.gold_field}: {self.gold.name} is plain text")
        self.examples = self._number_of_examples()
        references = self.gold.references[: self.examples]
        # Like the original's scripts, which leave out what has no reference.
        self.kept = [place for place, texts in enumerate(references) if texts]
        self.method: dict[str, str] = {}

    def run(self) -> None:
        """Scores all files, prints the table and writes what is to be written."""
        predictions = {name: self._read(name) for name in self.names}
        scored = self._score_questions(predictions) if self.task.kind == QUESTIONS else self._score(predictions)
        best = max(scored, key=lambda scores: scores.values[self.task.best_by])
        if self.output:
            self.output.write([json.dumps(self._report(scored, best), indent=2, ensure_ascii=False)])
        if self.args.json != STANDARD:
            Destination(STANDARD).write(self._table(scored, best))
        if self.args.save_best:
            fractions = {scores.file: scores.values[self.task.best_by] / 100 for scores in scored}
            for note in save_best(fractions, self.args.split):
                say("done", note)

    def _check_flags(self) -> None:
        others: tuple[str, ...] = _SUMMARY_FLAGS if self.task.kind == QUESTIONS else _QUESTION_FLAGS
        if self.args.task != "cnndm":
            others = (*others, "duplicate_rate")
        for name in others:
            if getattr(self.args, name) is not None:
                raise UserError(f"--{name} is not for --task {self.args.task}")
        if self.args.pool_key and self.args.pool_file:
            raise UserError("--pool_key and --pool_file exclude one another")
        if self.args.save_best and not self.args.split:
            raise UserError("--save_best needs --split")
        if os.sep in self.args.split:
            raise UserError(f"--split {self.args.split}: a part of a file's name, not a path")

    def _number_of_examples(self) -> int:
        total, wanted = len(self.gold.references), self.args.subset
        if wanted and wanted > total:
            raise UserError(f"--subset {wanted}: {self.gold.name} has {total} lines")
        if not any(self.gold.references[:wanted]):
            raise UserError(f"{self.gold.name}: the first {wanted} references are empty")
        return wanted or total

    def _read(self, name: str) -> list[str]:
        """The predictions of the examples that have a reference."""
        lines = read_lines(name)
        total = len(self.gold.references)
        if len(lines) != total and (len(lines) < self.examples or not self.args.subset):
            hint = f"; --subset {len(lines)} compares the first {len(lines)}" if len(lines) < self.examples else ""
            raise UserError(f"{name} has {len(lines)} lines and {self.gold.name} {total}{hint}")
        blank = sum(not line.strip() for line in lines[: self.examples])
        if blank:
            say("note", f"{name}: {blank} of {self.examples} predictions are empty and score 0")
        return [lines[place] for place in self.kept]

    def _score(self, predictions: dict[str, list[str]]) -> list[Scores]:
        args, raw = self.args, self.gold.field is not None
        texts = (self.gold.references[place] for place in self.kept)
        references = [[summary_reference(args.task, text, raw) for text in those] for those in texts]
        exceptions = read_exceptions(args.wordnet_exceptions) if args.wordnet_exceptions else None
        scored = []
        for name, lines in predictions.items():
            prepared = [summary_prediction(args.task, line, args.trunc_len, args.duplicate_rate) for line in lines]
            processes = args.processes or available_cores()
            found = rouge(
                prepared, references, exceptions=exceptions, resamples=args.bootstrap or 0, processes=processes
            )
            details: dict[str, Any] = {
                key: {metric: getattr(score, key) for metric, score in found.items()} for key in ("precision", "recall")
            }
            if args.bootstrap:
                details["interval"] = {metric: [score.low, score.high] for metric, score in found.items()}
            scored.append(Scores(name, {metric: score.f for metric, score in found.items()}, details))
        self._describe_rouge()
        return scored

    def _describe_rouge(self) -> None:
        args, task = self.args, self.task
        length = task.trunc_len if args.trunc_len is None else args.trunc_len
        self.method["ROUGE"] = (
            f"F x 100, rouge-score {version('rouge-score')}, Porter stemming as ROUGE-1.5.5 -m; ROUGE-L over sentences"
        )
        self.method["exceptions"] = (
            args.wordnet_exceptions or "none (no --wordnet_exceptions): the Perl script's ROUGE is higher"
        )
        if max(len(self.gold.references[place]) for place in self.kept) > 1:
            self.method["references"] = "of several the one with the highest F counts"
        if args.bootstrap:
            self.method["intervals"] = f"95 %, bootstrap of {args.bootstrap} resamples"
        self.method["predictions"] = f"cut to {length} words" if length else "not cut"
        if args.task == "cnndm":
            rate = task.duplicate_rate if args.duplicate_rate is None else args.duplicate_rate
            self.method["predictions"] += f", sentences repeated by more than {rate:g} dropped" if 0 < rate < 1 else ""

    def _score_questions(self, predictions: dict[str, list[str]]) -> list[Scores]:
        keys, pooling = self._keys()
        tokenization = self.args.tokenization or ("nqg" if self.gold.field in (None, "ref_tok") else "bert")
        meteor = self.args.meteor or "none"
        references = [self.gold.references[place] for place in self.kept]
        scored = []
        for name, lines in predictions.items():
            texts = question_texts(lines, references, tokenization)
            found = question_generation(*texts, keys=keys, meteor_implementation=meteor)
            items = int(found.pop("items"))
            values = {metric: found[metric] for metric in _COLUMNS if metric in found}
            scored.append(Scores(name, values, {"bleu": [found[f"bleu{order}"] for order in range(1, 5)]}))
        self.method = {
            "pooling": f"{pooling}: {items} items" + (", of each the last prediction counts" if keys else ""),
            "tokens": f"{tokenization}: {TOKENIZATIONS[tokenization]}",
            "BLEU-4": f"sacrebleu {version('sacrebleu')}, tokenize none, smoothing none, closest reference",
            "METEOR": METEORS[meteor],
            "ROUGE-L": "COCO's: best precision and best recall over the references, beta 1.2",
        }
        return scored

    def _keys(self) -> tuple[list[Hashable] | None, str]:
        """What examples are pooled by, and its name."""
        if self.args.pool_file:
            lines = read_lines(self.args.pool_file)
            if len(lines) != len(self.gold.references):
                sizes = f"{len(lines)} lines and {self.gold.name} {len(self.gold.references)}"
                raise UserError(f"{self.args.pool_file} has {sizes}")
            name = f"equal lines of {self.args.pool_file}"
        else:
            has_source = bool(self.gold.records) and POOL_KEYS["passage"] in self.gold.records[0]
            key = self.args.pool_key or ("passage" if has_source else "none")
            if key == "none":
                return None, key
            if self.gold.field is None:
                raise UserError(f"--pool_key {key}: {self.gold.name} is plain text; give JSON lines or --pool_file")
            lines = self.gold.texts(POOL_KEYS[key])
            name = f"{key} ('{POOL_KEYS[key]}')"
        # In lower case, as in the scripts of Du et al. and of UniLM.
        return [lines[place].strip().lower() for place in self.kept], name

    def _heading(self) -> str:
        place = f" ('{self.gold.field}')" if self.gold.field else ""
        left_out = self.examples - len(self.kept)
        rest = f", {left_out} more have no reference and are left out" if left_out else ""
        return f"{self.args.task}: {len(self.kept)} examples of {self.gold.name}{place}{rest}"

    def _table(self, scored: Sequence[Scores], best: Scores) -> list[str]:
        metrics = [name for name in _COLUMNS if name in scored[0].values]
        rows = [["file", *(_COLUMNS[name] for name in metrics), ""]]
        for scores in scored:
            mark = f"best by {_COLUMNS[self.task.best_by]}" if scores is best and len(scored) > 1 else ""
            rows.append([scores.file, *(_cell(scores, name) for name in metrics), mark])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
            for row in rows
        ]
        width = max(map(len, self.method)) + 2
        return [self._heading(), *lines, "", *(f"{name:{width}}{text}" for name, text in self.method.items())]

    def _report(self, scored: Sequence[Scores], best: Scores) -> dict[str, Any]:
        return {
            "task": self.args.task,
            "gold": self.gold.name,
            "gold_field": self.gold.field,
            "examples": len(self.kept),
            "left_out": self.examples - len(self.kept),
            "method": self.method,
            "best_by": self.task.best_by,
            "best": best.file,
            "files": [{"file": scores.file, "scores": scores.values, **scores.details} for scores in scored],
        }


def _cell(scores: Scores, name: str) -> str:
    value = f"{scores.values[name]:.2f}"
    if "interval" not in scores.details:
        return value
    low, high = scores.details["interval"][name]
    return f"{value} [{low:.2f}, {high:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: Evaluation(args).run())


if __name__ == "__main__":
    leave(main())

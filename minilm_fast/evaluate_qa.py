"""Score extracted answers as SQuAD's, MLQA's and XQuAD's scripts do: ``python -m minilm_fast.evaluate_qa``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilm_fast.cli import ArgumentParser, guarded, leave, say
from minilm_fast.decoding.output import STANDARD, Destination
from minilm_fast.errors import UserError


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="minilm_fast.evaluate_qa",
        description="Exact match and F1 of the answers in predictions_.json, as the scripts of SQuAD 1.1 (also "
        "for XQuAD), SQuAD 2.0 and MLQA count them. Of several files the average is given, too.",
    )
    add = parser.add_argument
    add("--data_file", nargs="+", required=True, type=Path, help="SQuAD's JSON with the answers, plain, gzip or xz")
    add("--prediction_file", nargs="+", required=True, type=Path, help="{id: text} for each of --data_file, in order")
    add(
        "--version_2_with_negative", action="store_true", help="score as SQuAD 2.0's script: no answer is an empty text"
    )
    add("--na_prob_file", nargs="+", type=Path, help="{id: number}, how likely there is no answer (null_odds_.json)")
    add("--na_prob_thresh", type=_number, default=1.0, help="above it a prediction counts as no answer")
    add(
        "--answer_language",
        "--language",
        help="score by MLQA's rules for this language, none for SQuAD's; by default what MLQA's file names say",
    )
    add("--json", metavar="FILE", help="write the scores; - for standard output, in place of the table")
    return parser


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("must be a number")
    return value


def _read(path: Path, kind: type[str] | type[float]) -> dict[str, Any]:
    from minilm_fast.data.squad import parse_json

    found = parse_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object of question ids")
    for name, value in found.items():
        right = isinstance(value, str) if kind is str else isinstance(value, (int, float)) and value == value
        if not right or isinstance(value, bool):
            raise UserError(
                f"{path}: {name!r} has {value!r} where a {'text' if kind is str else 'number'} was expected"
            )
    return found


def _scores(args: argparse.Namespace, data: Path, predictions: Path, odds: Path | None) -> dict[str, float]:
    from minilm_fast.data.squad import gold_answers, read_squad
    from minilm_fast.metrics.squad import language_for, squad_scores, squad_v2_scores

    language = language_for(data, args.answer_language, args.version_2_with_negative)
    answers = gold_answers(read_squad(data, with_answers=True))
    found = _read(predictions, str)
    try:
        if args.version_2_with_negative:
            na_probs = None if odds is None else _read(odds, float)
            return squad_v2_scores(answers, found, na_probs, args.na_prob_thresh)
        absent = sum(name not in found for name in answers)
        if absent:
            say("note", f"{predictions}: {absent} of {len(answers)} questions have no prediction and score 0")
        return squad_scores(answers, found, language)
    except UserError as error:
        raise UserError(f"{data} with {predictions}: {error}") from None


def _run(args: argparse.Namespace) -> None:
    from minilm_fast.data.squad import set_names
    from minilm_fast.metrics.squad import average, table

    for flag, files in (("--prediction_file", args.prediction_file), ("--na_prob_file", args.na_prob_file)):
        if files is not None and len(files) != len(args.data_file):
            raise UserError(f"{flag} names {len(files)} files and --data_file {len(args.data_file)}")
    if args.na_prob_file and not args.version_2_with_negative:
        raise UserError("--na_prob_file needs --version_2_with_negative")
    output = Destination(args.json) if args.json else None
    if output:
        output.check()
    odds = args.na_prob_file or [None] * len(args.data_file)
    triples = zip(args.data_file, args.prediction_file, odds, strict=True)
    scores = {name: _scores(args, *files) for name, files in zip(set_names(args.data_file), triples, strict=True)}
    several = len(scores) > 1
    content = {"average": average(scores), **scores} if several else next(iter(scores.values()))
    if output:
        output.write([json.dumps(content, indent=2)])
    if args.json != STANDARD:
        text = table(scores) if several else json.dumps(content, indent=2)
        Destination(STANDARD).write(text.splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guarded(lambda: _run(args))


if __name__ == "__main__":
    leave(main())

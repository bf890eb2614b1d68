"""Fine-tune an encoder on XNLI in one language, measure it in many: ``python -m minilm_fast.run_xnli``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast.cli import ArgumentParser, leave, run_understanding
from minilm_fast.errors import UserError
from minilm_fast.training.flags import add_understanding_flags, check_understanding

if TYPE_CHECKING:
    from minilm_fast.data.classification import ClassificationFeatures, TextExample
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer

logger = logging.getLogger("minilm_fast.run_xnli")  # the name is __main__ under python -m

TABLE = "xnli_table.txt"


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are the original's unless a flag says otherwise."""
    parser = ArgumentParser(prog="minilm_fast.run_xnli", description=__doc__)
    add = parser.add_argument
    add("--language", required=True, help="languages to measure: one, several with commas between them, or all")
    add("--train_language", help="language to train in; default: the one to measure, or en of several")
    add("--train_file", type=Path, help="in place of the training file in DATA_DIR (new)")
    add_understanding_flags(parser)
    return parser


def _train_language(args: argparse.Namespace) -> str:
    from minilm_fast.data.xnli import parse_languages

    languages = parse_languages(args.train_language or args.language)
    if len(languages) == 1:
        return languages[0]
    if args.train_language or "en" not in languages:
        raise UserError("--train_language must be one language")
    return "en"


def table(measures: Mapping[str, float], languages: Sequence[str]) -> str:
    """Accuracies in percent as in MiniLM's table: the average over the languages, then each.

    Args:
        measures: with ``test_accuracy``, and ``test_LANGUAGE_accuracy`` where there are several languages.
    """
    values = {language: measures.get(f"test_{language}_accuracy", measures["test_accuracy"]) for language in languages}
    average = sum(values.values()) / len(values)
    header = ["Average", *values]
    cells = [f"{100 * value:.1f}" for value in (average, *values.values())]
    width = [max(map(len, pair)) for pair in zip(header, cells, strict=True)]
    rows = (" | ".join(cell.rjust(w) for cell, w in zip(row, width, strict=True)) for row in (header, cells))
    return "\n".join(f"| {row} |" for row in rows) + "\n"


@dataclass(frozen=True)
class Data:
    """Everything that is read.

    Attributes:
        train: empty without ``--do_train``.
        dev, test: by language.
        known: what the training set is known by.
    """

    train: ClassificationFeatures
    dev: dict[str, ClassificationFeatures]
    test: dict[str, ClassificationFeatures]
    known: dict[str, str]


def _read(
    args: argparse.Namespace, labels: Sequence[str], features: Callable[[Sequence[TextExample]], ClassificationFeatures]
) -> Data:
    from minilm_fast.data.feature_cache import digest_of
    from minilm_fast.data.xnli import find_train, parse_languages, read_split, read_xnli

    languages = parse_languages(args.language)

    def split(name: str, *, required: bool) -> dict[str, ClassificationFeatures]:
        found = read_split(args.data_dir, name, languages, labels)
        missing = [language for language in languages if language not in found]
        if missing and required:
            raise UserError(f"--data_dir {args.data_dir}: neither {name}-{missing[0]}.tsv nor XNLI-1.0/xnli.{name}.tsv")
        logger.info("%s: %d examples in %d languages", name, sum(map(len, found.values())), len(found))
        return {language: features(examples) for language, examples in found.items()}

    train, known = features([]), {}
    if args.do_train:
        path = args.train_file or find_train(args.data_dir, _train_language(args))
        train, known = features(read_xnli(path, labels, training=True)), {"train_file": digest_of(path)}
        logger.info("train: %d examples in %s", len(train), path)
    choosing = args.evaluate_during_training or args.eval_all_checkpoints
    dev = split("dev", required=choosing) if choosing or args.do_eval else {}
    test = split("test", required=True) if args.do_eval or args.do_predict else {}
    return Data(train, dev, test, known)


def make_trainer(args: argparse.Namespace, world: World) -> Trainer:
    """Everything that training and measuring need, read and checked.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.data.classification import make_classification_features
    from minilm_fast.data.xnli import LABELS
    from minilm_fast.training import understanding
    from minilm_fast.training.classification import ClassificationTask, Submission, options_of
    from minilm_fast.training.loading import make_classifier

    torch.manual_seed(args.seed)
    loaded, tokenizer = understanding.start(args)
    model, labels = make_classifier(loaded, LABELS, LABELS, fresh_head=args.do_train)
    model.bert.gradient_checkpointing = args.gradient_checkpointing
    # As in the original, the second text has another token type with --model_type bert only.
    typed = (args.model_type or loaded.config.model_type) == "bert"

    def features(examples: Sequence[TextExample]) -> ClassificationFeatures:
        return make_classification_features(examples, tokenizer, args.max_seq_length, token_types=typed)

    data = _read(args, labels, features)
    submissions = [
        Submission(f"predictions-{language}", range(len(found)), found, lambda number: labels[int(number)])
        for language, found in data.test.items()
    ]
    task = ClassificationTask(
        model,
        tokenizer,
        data.train,
        data.dev,
        options_of(args),
        world,
        understanding.identity(args, **data.known),
        test=data.test,
        submissions=submissions,
        on_report=lambda measures, folder: _write_table(table(measures, list(data.test)), folder),
    )
    return understanding.make_trainer(args, task, len(data.train), "dev_accuracy", world, task.measure_names())


def _write_table(text: str, folder: Path) -> None:
    from minilm_fast.atomic import atomic_write
    from minilm_fast.decoding.output import STANDARD, Destination

    with atomic_write(folder / TABLE) as file:
        file.write(text.encode())
    Destination(STANDARD).write(text.splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_understanding(build_parser().parse_args(argv), make_trainer, _check)


def _check(args: argparse.Namespace) -> None:
    from minilm_fast.data.xnli import parse_languages

    check_understanding(args)
    parse_languages(args.language)
    if args.do_train and args.train_file is None:
        _train_language(args)
    if args.data_dir is None and (args.do_eval or args.do_predict or args.train_file is None):
        raise UserError("give --data_dir")


if __name__ == "__main__":
    leave(main())

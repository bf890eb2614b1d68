"""Fine-tune an encoder on XNLI in one language, measure it in many: ``python -m minilm_fast.run_xnli``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast.cli import ArgumentParser, leave, run_understanding
from minilm_fast.errors import UserError
from minilm_fast.training.flags import add_understanding_flags, check_understanding

if TYPE_CHECKING:
    from minilm_fast.data.classification import ClassificationFeatures, TextExample
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer

logger = logging.getLogger(__name__)

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


def _train_examples(args: argparse.Namespace, labels: Sequence[str]) -> tuple[Path, list[TextExample]]:
    from minilm_fast.data.xnli import find_split, read_xnli

    if args.train_file is not None:
        return args.train_file, read_xnli(args.train_file, labels=labels)
    language = _train_language(args)
    found = find_split(args.data_dir, "train", language)
    if found is None:
        raise UserError(
            f"--data_dir {args.data_dir}: no training data in {language!r}: neither train-{language}.tsv nor "
            f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
        )
    return found[0], read_xnli(found[0], labels=labels)


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


def make_trainer(args: argparse.Namespace, world: World) -> Trainer:
    """Everything that training and measuring need, read and checked.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.atomic import atomic_write
    from minilm_fast.data.classification import make_classification_features
    from minilm_fast.data.feature_cache import digest_of
    from minilm_fast.data.xnli import LABELS, find_split, parse_languages, read_xnli
    from minilm_fast.training import understanding
    from minilm_fast.training.classification import ClassificationOptions, ClassificationTask, Submission
    from minilm_fast.training.loading import make_classifier

    torch.manual_seed(args.seed)
    languages = parse_languages(args.language)
    loaded, tokenizer = understanding.start(args)
    model, labels = make_classifier(loaded, LABELS, LABELS, fresh_head=args.do_train)
    kind = args.model_type or loaded.config.model_type

    def features(examples: Sequence[TextExample]) -> ClassificationFeatures:
        return make_classification_features(examples, tokenizer, args.max_seq_length, token_types=kind == "bert")

    def split(name: str, *, required: bool) -> dict[str, ClassificationFeatures]:
        sets = {}
        for language in languages:
            found = find_split(args.data_dir, name, language)
            if found is not None:
                sets[language] = features(read_xnli(found[0], language if found[1] else None, labels))
            elif required:
                raise UserError(
                    f"--data_dir {args.data_dir}: neither {name}-{language}.tsv nor XNLI-1.0/xnli.{name}.tsv"
                )
        logger.info("%s: %d examples in %d languages", name, sum(map(len, sets.values())), len(sets))
        return sets

    train, known = features([]), {}
    if args.do_train:
        path, examples = _train_examples(args, labels)
        train, known = features(examples), {"train_file": digest_of(path)}
        logger.info("train: %d examples in %s", len(train), path)
    choosing = args.evaluate_during_training or args.eval_all_checkpoints
    dev = split("dev", required=choosing) if choosing or args.do_eval else {}
    test = split("test", required=True) if args.do_eval or args.do_predict else {}

    def show(measures: Mapping[str, float], folder: Path) -> None:
        text = table(measures, languages)
        with atomic_write(folder / TABLE) as file:
            file.write(text.encode())
        print(text, end="", flush=True)

    options = ClassificationOptions(
        per_gpu_train_batch_size=args.per_gpu_train_batch_size,
        per_gpu_eval_batch_size=args.per_gpu_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        seed=args.seed,
        save_format=args.save_format,
        pad_to_multiple_of=64 if args.bf16 or args.fp16 else 1,
    )
    numbers = {language: [str(number) for number in range(len(found))] for language, found in test.items()}
    submissions = [
        Submission(f"predictions-{language}", numbers[language], found, lambda number: labels[int(number)])
        for language, found in test.items()
    ]
    model.bert.gradient_checkpointing = args.gradient_checkpointing
    task = ClassificationTask(
        model,
        tokenizer,
        train,
        dev,
        options,
        world,
        understanding.identity(args, **known),
        test=test,
        submissions=submissions,
        on_report=show,
    )
    return understanding.make_trainer(args, task, len(train), "dev_accuracy", world, task.measure_names())


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

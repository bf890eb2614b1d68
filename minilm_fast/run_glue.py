"""Fine-tune an encoder on a GLUE task, measure and predict: ``python -m minilm_fast.run_glue``."""

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
    from minilm_fast.data.classification import ClassificationFeatures
    from minilm_fast.data.glue import GlueTask
    from minilm_fast.tokenization import Tokenizer
    from minilm_fast.training.classification import Submission
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer

logger = logging.getLogger("minilm_fast.run_glue")  # the name is __main__ under python -m

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst-2", "sts-b", "wnli")


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are those of transformers' run_glue.py of 2020 unless a flag says so."""
    parser = ArgumentParser(prog="minilm_fast.run_glue", description=__doc__)
    add = parser.add_argument
    add("--task_name", required=True, type=str.lower, choices=TASKS, metavar="TASK", help=f"of: {', '.join(TASKS)}")
    add("--train_file", type=Path, help="in place of DATA_DIR/train.tsv (new)")
    add("--dev_file", type=Path, help="in place of DATA_DIR/dev.tsv, or dev_matched.tsv and dev_mismatched.tsv (new)")
    add("--test_file", type=Path, help="in place of DATA_DIR/test.tsv (new)")
    add_understanding_flags(parser)
    return parser


def _train_file(args: argparse.Namespace, task: GlueTask) -> Path:
    from minilm_fast.data.glue import find_split

    found = args.train_file or find_split(args.data_dir, "train", task)
    if found is None:
        raise UserError(f"--data_dir {args.data_dir}: no train.tsv there or in {task.name}")
    return Path(found)


def _files(args: argparse.Namespace, task: GlueTask, given: Path | None, stems: Mapping[str, str]) -> dict[str, Path]:
    """The files of a split by name; of several, those that are there."""
    from minilm_fast.data.glue import find_split

    if given is not None:
        return {next(iter(stems)) if len(stems) == 1 else given.name.split(".")[0]: given}
    found = {name: find_split(args.data_dir, stem, task) for name, stem in stems.items()}
    present = {name: path for name, path in found.items() if path is not None}
    if not present:
        raise UserError(f"--data_dir {args.data_dir}: no {' or '.join(stems.values())}.tsv there or in {task.name}")
    for name in found.keys() - present.keys():
        logger.warning("warning: %s has no %s.tsv: it is left out", args.data_dir, stems[name])
    return present


def _submissions(
    args: argparse.Namespace, task: GlueTask, labels: Sequence[str], tokenizer: Tokenizer
) -> list[Submission]:
    from minilm_fast.data.classification import make_classification_features
    from minilm_fast.data.glue import MOST_SCORE, read_glue_test
    from minilm_fast.training.classification import Submission

    def show(prediction: float) -> str:
        if task.regression:
            return f"{min(max(prediction, 0.0), MOST_SCORE):.3f}"
        return labels[int(prediction)]

    found = []
    for name, path in _files(args, task, args.test_file, task.submissions).items():
        numbers, examples = read_glue_test(path, args.task_name)
        features = make_classification_features(examples, tokenizer, args.max_seq_length)
        found.append(Submission(name, numbers, features, show))
    return found


def make_trainer(args: argparse.Namespace, world: World) -> Trainer:
    """Everything that training and measuring need, read and checked.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.data.classification import make_classification_features
    from minilm_fast.data.feature_cache import digest_of
    from minilm_fast.data.glue import glue_task, read_glue
    from minilm_fast.training import understanding
    from minilm_fast.training.classification import ClassificationTask, options_of
    from minilm_fast.training.loading import make_classifier

    torch.manual_seed(args.seed)
    task = glue_task(args.task_name)
    loaded, tokenizer = understanding.start(args)
    model, labels = make_classifier(loaded, task.labels, task.meanings, fresh_head=args.do_train)

    def features(path: Path) -> ClassificationFeatures:
        examples = read_glue(path, args.task_name, labels)
        logger.info("%d examples in %s", len(examples), path)
        return make_classification_features(examples, tokenizer, args.max_seq_length)

    train, known = make_classification_features([], tokenizer, args.max_seq_length), {}
    if args.do_train:
        path = _train_file(args, task)
        train, known = features(path), {"train_file": digest_of(path)}
    dev = {}
    if args.do_eval or args.evaluate_during_training:
        dev = {name: features(path) for name, path in _files(args, task, args.dev_file, task.dev).items()}
    identity = understanding.identity(args, task_name=args.task_name, **known)
    submissions = _submissions(args, task, labels, tokenizer) if args.do_predict else []
    model.bert.gradient_checkpointing = args.gradient_checkpointing
    trained = ClassificationTask(
        model,
        tokenizer,
        train,
        dev,
        options_of(args, task.metrics, regression=task.regression),
        world,
        identity,
        submissions=submissions,
    )
    first = next(iter(dev)) if len(dev) > 1 else ""
    metric = "_".join(part for part in ("dev", first, task.metrics[0]) if part)
    return understanding.make_trainer(args, trained, len(train), metric, world, trained.measure_names())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_understanding(build_parser().parse_args(argv), make_trainer, _check)


def _check(args: argparse.Namespace) -> None:
    check_understanding(args)
    needed = {
        "train_file": args.do_train,
        "dev_file": args.do_eval or args.evaluate_during_training,
        "test_file": args.do_predict,
    }
    for name, wanted in needed.items():
        if wanted and args.data_dir is None and getattr(args, name) is None:
            raise UserError(f"give --data_dir, or --{name}")


if __name__ == "__main__":
    leave(main())

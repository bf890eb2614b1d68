"""Fine-tune and measure a model that extracts answers (SQuAD, MLQA, XQuAD): ``python -m minilm_fast.run_squad``."""

from __future__ import annotations

import argparse
import glob
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast.cli import ArgumentParser, leave, run_understanding
from minilm_fast.errors import UserError
from minilm_fast.training.flags import add_understanding_flags, check_understanding, number, positive_int

if TYPE_CHECKING:
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer
    from minilm_fast.training.question_answering import QuestionAnsweringOptions, QuestionSet

logger = logging.getLogger("minilm_fast.run_squad")  # the name is __main__ under python -m

TABLE = "qa_table.txt"
_COMPRESSED = ("", ".gz", ".xz")


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are those of transformers' script unless a flag says otherwise."""
    parser = ArgumentParser(prog="minilm_fast.run_squad", description=__doc__)
    add = parser.add_argument
    add("--train_file", help="SQuAD's JSON, plain, gzip or xz; in DATA_DIR if that is given (default: train-v1.1.json)")
    add(
        "--predict_file",
        nargs="+",
        help="files to answer; may hold * and ? (default: dev-v1.1.json, with --version_2_with_negative dev-v2.0.json)",
    )
    add("--dev_file", help="measure checkpoints on this file, in place of all of --predict_file (new)")
    add(
        "--answer_language",
        help="score by MLQA's rules for this language, none for SQuAD's; by default what MLQA's file names say (new)",
    )
    add("--version_2_with_negative", action="store_true", help="questions may have no answer")
    add(
        "--null_score_diff_threshold",
        type=number,
        default=0.0,
        help="no answer if its score is above by more than this",
    )
    add("--doc_stride", type=positive_int, default=128, help="tokens between the starts of two windows of a context")
    add("--max_query_length", type=positive_int, default=64, help="longer questions are cut to so many tokens")
    add("--n_best_size", type=positive_int, default=20, help="answers of a question in nbest_predictions_.json")
    add("--max_answer_length", type=positive_int, default=30, help="tokens")
    add("--threads", type=positive_int, default=1, help="processes that tokenise")
    add("--verbose_logging", action="store_true", help="accepted, has no effect: no answer is guessed from its tokens")
    add("--lang_id", type=int, default=0, help="accepted, has no effect: no family here has language embeddings")
    add_understanding_flags(parser, max_seq_length=384)
    return parser


def _find(args: argparse.Namespace, name: str) -> Path:
    path = Path(args.data_dir or "") / name
    return next((found for end in _COMPRESSED if (found := Path(f"{path}{end}")).is_file()), path)


def _train_file(args: argparse.Namespace) -> Path:
    return _find(args, args.train_file or f"train-v{_version(args)}.json")


def _predict_files(args: argparse.Namespace) -> list[Path]:
    found: list[Path] = []
    for name in args.predict_file or [f"dev-v{_version(args)}.json"]:
        path = _find(args, name)
        matches = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(name) and not path.exists() else [path]
        if not matches:
            raise UserError(f"--predict_file {name}: no such file")
        found += [match for match in matches if match not in found]
    return found


def _version(args: argparse.Namespace) -> str:
    return "2.0" if args.version_2_with_negative else "1.1"


def _language(args: argparse.Namespace, path: Path) -> str | None:
    from minilm_fast.metrics.squad import language_for

    return language_for(path, args.answer_language, args.version_2_with_negative)


def _options(args: argparse.Namespace) -> QuestionAnsweringOptions:
    from minilm_fast.modeling.answers import AnswerOptions
    from minilm_fast.training.question_answering import QuestionAnsweringOptions

    answers = AnswerOptions(**{name: getattr(args, name) for name in AnswerOptions.__dataclass_fields__})
    names = QuestionAnsweringOptions.__dataclass_fields__.keys() - {"answers", "pad_to_multiple_of"}
    multiple = 64 if args.bf16 or args.fp16 else 1
    values = {name: getattr(args, name) for name in names}
    return QuestionAnsweringOptions(answers=answers, pad_to_multiple_of=multiple, **values)


def make_trainer(args: argparse.Namespace, world: World) -> Trainer:
    """Everything that training and measuring need, read and checked.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.atomic import atomic_write
    from minilm_fast.data.answer_windows import WindowOptions, make_windows
    from minilm_fast.data.feature_cache import digest_of
    from minilm_fast.data.squad import gold_answers, read_squad, set_names
    from minilm_fast.decoding.output import STANDARD, Destination
    from minilm_fast.metrics.squad import table
    from minilm_fast.modeling.question_answering import QuestionAnswerer
    from minilm_fast.training import understanding
    from minilm_fast.training.question_answering import QuestionAnsweringTask, QuestionSet

    torch.manual_seed(args.seed)
    loaded, tokenizer = understanding.start(args)
    model = QuestionAnswerer.from_state(loaded.config, {**loaded.state, **loaded.extra_state})
    model.bert.gradient_checkpointing = args.gradient_checkpointing
    window_options = WindowOptions(**{name: getattr(args, name) for name in WindowOptions.__dataclass_fields__})

    def questions(path: Path, name: str) -> QuestionSet:
        scored = args.do_eval or args.evaluate_during_training
        paragraphs = read_squad(path, with_answers=scored)
        windows = make_windows(
            paragraphs, tokenizer, window_options, training=False, threads=args.threads, name=str(path)
        )
        answers = gold_answers(paragraphs)
        absent = next((name for name, texts in answers.items() if not texts), None)
        if absent and scored and not args.version_2_with_negative:
            raise UserError(f"{path}: question {absent} has no answer; give --version_2_with_negative")
        logger.info("%s: %d questions, %d windows", path, len(answers), len(windows))
        return QuestionSet(name, list(answers), answers, windows, _language(args, path))

    test: list[QuestionSet] = []
    paths = _predict_files(args) if _measures(args) else []
    if args.do_eval or args.do_predict or (args.evaluate_during_training and not args.dev_file):
        test = [questions(path, name) for path, name in zip(paths, set_names(paths), strict=True)]
    dev = [questions(_find(args, args.dev_file), "dev")] if args.dev_file and _measures(args) else test
    windows, known = [], {}
    if args.do_train:
        path = _train_file(args)
        paragraphs = read_squad(path, with_answers=True)
        windows = make_windows(
            paragraphs, tokenizer, window_options, training=True, threads=args.threads, name=str(path)
        )
        known = {
            "train_file": digest_of(path),
            "doc_stride": args.doc_stride,
            "max_query_length": args.max_query_length,
        }
        tokens = sum(map(len, windows))
        logger.info("%s: %d windows of %.1f tokens", path, len(windows), tokens / len(windows))

    def show(found: Mapping[str, Mapping[str, float]], folder: Path) -> None:
        if len(found) < 2:
            return
        text = table(found)
        with atomic_write(folder / TABLE) as file:
            file.write(text.encode())
        Destination(STANDARD).write(text.splitlines())

    task = QuestionAnsweringTask(
        model,
        tokenizer,
        windows,
        dev,
        _options(args),
        world,
        understanding.identity(args, **known),
        test=test,
        on_report=show,
    )
    return understanding.make_trainer(args, task, len(windows), "dev_f1", world, task.measure_names())


def _measures(args: argparse.Namespace) -> bool:
    return bool(args.do_eval or args.do_predict or args.evaluate_during_training)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_understanding(build_parser().parse_args(argv), make_trainer, _check)


def _check(args: argparse.Namespace) -> None:
    check_understanding(args)
    if args.max_seq_length < args.max_query_length + 5:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} leaves no room for the context beside a question of "
            f"--max_query_length {args.max_query_length} tokens"
        )
    if args.data_dir is None and args.do_train and args.train_file is None:
        raise UserError("--do_train needs --train_file or --data_dir")
    if args.data_dir is None and _measures(args) and args.predict_file is None:
        raise UserError("give --predict_file or --data_dir")
    paths = [_train_file(args)] * args.do_train + (_predict_files(args) if _measures(args) else [])
    for path in [*paths, *([_find(args, args.dev_file)] if args.dev_file else [])]:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    for path in _predict_files(args) if _measures(args) else []:
        _language(args, path)


if __name__ == "__main__":
    leave(main())

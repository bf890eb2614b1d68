"""Fine-tune a BERT-family encoder as a sequence-to-sequence model: ``python -m minilm_fast.run_seq2seq``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilm_fast.cli import ArgumentParser, guarded
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from minilm_fast.hub import Resolved
    from minilm_fast.modeling.seq2seq import Seq2SeqModel
    from minilm_fast.training.loop import Trainer

logger = logging.getLogger(__name__)


def _positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _finite_positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def build_parser() -> ArgumentParser:
    """The command line; names and defaults are the original's unless a flag says otherwise."""
    parser = ArgumentParser(prog="minilm_fast.run_seq2seq", description=__doc__)
    add = parser.add_argument
    add("--train_file", required=True, type=Path, help="JSON lines with 'src' and 'tgt'")
    add("--model_type", required=True, help="tokenizer and layout: bert, minilm, unilm, roberta, xlm-roberta")
    add("--model_name_or_path", required=True, help="checkpoint to start from")
    add("--output_dir", required=True, type=Path, help="checkpoints ckpt-N go here; a run found here is resumed")
    add("--config_name", help="configuration file in place of the checkpoint's own")
    add("--tokenizer_name", help="vocabulary or tokenizer folder in place of the checkpoint's own")
    add("--do_lower_case", action="store_true", help="uncased vocabulary")
    add("--fix_word_embedding", action="store_true", help="do not train the word embeddings")
    add("--max_source_seq_length", type=_positive_int, default=464, help="tokens, [CLS] and [SEP] included")
    add("--max_target_seq_length", type=_positive_int, default=48, help="tokens, [SEP] included")
    add("--per_gpu_train_batch_size", type=_positive_int, default=8)
    add("--gradient_accumulation_steps", type=_positive_int, default=1)
    add("--learning_rate", type=_finite_positive, default=5e-5)
    add("--weight_decay", type=float, default=0.01)
    add("--adam_epsilon", type=_finite_positive, default=1e-8)
    add("--max_grad_norm", type=_finite_positive, default=1.0)
    add("--label_smoothing", type=float, default=0.1)
    add("--num_training_steps", type=int, default=-1, help="optimiser steps; by default --num_training_epochs counts")
    add("--num_training_epochs", type=_positive_int, default=10)
    add("--num_warmup_steps", type=int, default=0)
    add("--random_prob", type=float, default=0.1, help="chance that a masked token becomes a random one")
    add("--keep_prob", type=float, default=0.1, help="chance that a masked token stays as it is")
    add("--source_mask_prob", type=float, default=-1.0)
    add("--target_mask_prob", type=float, default=0.5)
    add("--logging_steps", type=_positive_int, default=500)
    add("--save_steps", type=_positive_int, default=1500)
    add("--seed", type=int, default=42)
    add("--bf16", action="store_true", help="bfloat16 autocast (new)")
    add("--group_by_length", action="store_true", help="batches of about equal lengths (new)")
    add("--dev_file", type=Path, help="its loss is reported at every checkpoint (new)")
    add("--max_dev_examples", type=_positive_int, default=200, help="use this many, spread over the file (new)")
    return parser


def _load_model(args: argparse.Namespace, resolved: Resolved) -> Seq2SeqModel:
    from minilm_fast import checkpoint
    from minilm_fast.modeling.seq2seq import Seq2SeqModel
    from minilm_fast.training import checkpointing

    step = checkpointing.latest_step(args.output_dir)
    if step is not None:
        return Seq2SeqModel.from_state(*checkpointing.load_weights(args.output_dir, step))
    loaded = checkpoint.load(resolved.weights, config=resolved.config, model_type=args.model_type, for_training=True)
    positions = args.max_source_seq_length + args.max_target_seq_length
    config = loaded.config.replace(
        label_smoothing=args.label_smoothing,
        fix_word_embedding=args.fix_word_embedding,
        max_position_embeddings=max(loaded.config.max_position_embeddings, positions),
    )
    return Seq2SeqModel.from_state(config, loaded.state)


def make_trainer(args: argparse.Namespace) -> Trainer:
    """Everything that :meth:`Trainer.train` needs, read and checked.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast import checkpoint
    from minilm_fast.data.examples import read_examples
    from minilm_fast.data.features import make_features, special_ids
    from minilm_fast.data.pseudo_masking import Masking
    from minilm_fast.tokenization import Tokenizer
    from minilm_fast.training.loop import Trainer, TrainingOptions

    torch.manual_seed(args.seed)
    resolved = checkpoint.resolve(
        args.model_name_or_path, config_name=args.config_name, tokenizer_name=args.tokenizer_name
    )
    if resolved.tokenizer is None:
        raise UserError(f"{args.model_name_or_path} holds no vocabulary: give --tokenizer_name")
    tokenizer = Tokenizer.from_pretrained(
        resolved.tokenizer, model_type=args.model_type, do_lower_case=args.do_lower_case
    )
    model = _load_model(args, resolved)
    special = special_ids(tokenizer)
    if special.vocab_size > model.config.vocab_size:
        raise UserError(f"the vocabulary has {special.vocab_size} entries, the checkpoint {model.config.vocab_size}")
    features = make_features(read_examples(args.train_file), tokenizer)
    dev = list(read_examples(args.dev_file)) if args.dev_file else []
    dev = dev[:: max(1, len(dev) // args.max_dev_examples)][: args.max_dev_examples]
    masking = Masking(args.random_prob, args.keep_prob, args.source_mask_prob, args.target_mask_prob)
    names = TrainingOptions.__dataclass_fields__.keys() - {"masking"}
    options = TrainingOptions(masking=masking, **{name: getattr(args, name) for name in names})
    logger.info("%d training examples, %d dev examples", len(features), len(dev))
    return Trainer(model, tokenizer, special, features, make_features(dev, tokenizer), options, args.output_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    trainer: Trainer | None = None

    def run() -> None:
        nonlocal trainer
        _check(args)
        trainer = make_trainer(args)
        _make_output_dir(args.output_dir)
        trainer.resume()
        trainer.train()

    return guarded(run, lambda: trainer.hint() if trainer else "")


def _check(args: argparse.Namespace) -> None:
    if args.max_source_seq_length < 3:
        raise UserError("--max_source_seq_length must be at least 3")
    if not 0 <= args.label_smoothing < 1:
        raise UserError("--label_smoothing must be at least 0 and below 1")
    for name in ("random_prob", "keep_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} must be between 0 and 1")


def _make_output_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune a BERT-family encoder as a sequence-to-sequence model: ``python -m minilm_fast.run_seq2seq``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm_fast.cli import ArgumentParser, leave, run_training
from minilm_fast.errors import UserError
from minilm_fast.training.flags import add_loop_flags, known_by, loop_options, natural, positive_int

if TYPE_CHECKING:
    from minilm_fast.data.examples import Example
    from minilm_fast.data.features import FeatureStore
    from minilm_fast.data.masking import Masker
    from minilm_fast.hub import Resolved
    from minilm_fast.modeling.seq2seq import Seq2SeqModel
    from minilm_fast.tokenization import Tokenizer
    from minilm_fast.training.distributed import World
    from minilm_fast.training.generation import Generation
    from minilm_fast.training.loop import Trainer
    from minilm_fast.training.seq2seq import Seq2SeqOptions

logger = logging.getLogger("minilm_fast.run_seq2seq")  # the name is __main__ under python -m

# What minilm_fast.metrics can score.
TASKS = ("xsum", "cnndm", "gigaword", "qg")


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
    add("--cache_dir", help="where downloads from the hub are kept")
    add("--do_lower_case", action="store_true", help="uncased vocabulary, if the checkpoint does not say so")
    add("--fix_word_embedding", action="store_true", help="do not train the word embeddings")
    add("--label_smoothing", type=float, default=0.1, help="probability that is taken from a label for all other words")
    add("--save_format", choices=("safetensors", "bin", "both"), default="both", help="of the weights (new)")
    add_loop_flags(parser)
    _add_data_flags(parser)
    _add_dev_flags(parser)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max_source_seq_length", type=positive_int, default=464, help="tokens, [CLS] and [SEP] included")
    add("--max_target_seq_length", type=positive_int, default=48, help="tokens, [SEP] included")
    add("--mask_way", choices=("v0", "v1", "v2"), default="v2", help="position shift, masked LM, pseudo-masking")
    add("--num_max_mask_token", type=natural, default=0, help="most tokens that v1 masks in a target; 0: no limit")
    add("--random_prob", type=float, default=0.1, help="chance that a masked token becomes a random one")
    add("--keep_prob", type=float, default=0.1, help="chance that a masked token stays as it is")
    add("--source_mask_prob", type=float, default=-1.0, help="chance that a source token is masked; negative: none")
    target = "chance (v1: share) of a target token to be masked; v2: to give its place to its pseudo token"
    add("--target_mask_prob", type=float, default=0.5, help=target)
    add(
        "--cached_train_features_file",
        type=Path,
        help="Arrow file of the tokenised examples; default: in OUTPUT_DIR if the package datasets is installed",
    )
    add(
        "--preprocessing_num_workers",
        type=positive_int,
        help="processes that tokenise; default: by the file's size (new)",
    )
    add("--lmdb_cache", action="store_true", help="accepted, has no effect: features are cached in Arrow files")
    add("--lmdb_dtype", default="h", help="accepted, has no effect")
    add(
        "--max_tokens",
        type=positive_int,
        help="a batch is as many examples as fit into so many tokens, in place of --per_gpu_train_batch_size (new)",
    )
    add("--group_by_length", action="store_true", help="batches of about equal lengths (new)")
    add(
        "--average_tokens_across_batches",
        action="store_true",
        help="every token of an optimiser step weighs the same, whatever micro-batch it is in (new)",
    )


def _add_dev_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dev_file", type=Path, help="its loss is measured at every checkpoint (new)")
    add("--max_dev_examples", type=positive_int, default=200, help="use this many, spread over the file (new)")
    add(
        "--dev_task",
        choices=TASKS,
        help="decode dev examples at every checkpoint and score them as this task does (new)",
    )
    add("--max_dev_generate", type=positive_int, default=100, help="decode this many of the dev examples (new)")
    add("--dev_beam_size", type=positive_int, default=1, help="beams of that decoding (new)")


def _tokenizer_and_weights(args: argparse.Namespace) -> tuple[Tokenizer, Resolved]:
    from minilm_fast import checkpoint
    from minilm_fast.tokenization import Tokenizer

    resolved = checkpoint.resolve(
        args.model_name_or_path,
        config_name=args.config_name,
        tokenizer_name=args.tokenizer_name,
        cache_dir=args.cache_dir,
    )
    if resolved.tokenizer is None:
        raise UserError(f"{args.model_name_or_path} holds no vocabulary: give --tokenizer_name")
    tokenizer = Tokenizer.from_pretrained(
        resolved.tokenizer,
        model_type=args.model_type,
        do_lower_case=args.do_lower_case or None,
        cache_dir=args.cache_dir,
    )
    return tokenizer, resolved


def _load_model(args: argparse.Namespace, resolved: Resolved, tokenizer: Tokenizer) -> Seq2SeqModel:
    from minilm_fast import checkpoint
    from minilm_fast.modeling.seq2seq import Seq2SeqModel

    loaded = checkpoint.load(resolved.weights, config=resolved.config, model_type=args.model_type, for_training=True)
    checkpoint.check_tokenizer(loaded.config, loaded.tokenizer_record, tokenizer)
    positions = args.max_source_seq_length + args.max_target_seq_length
    config = loaded.config.replace(
        label_smoothing=args.label_smoothing,
        fix_word_embedding=args.fix_word_embedding,
        max_position_embeddings=max(loaded.config.max_position_embeddings, positions),
    )
    model = Seq2SeqModel.from_state(config, loaded.state)
    model.bert.gradient_checkpointing = args.gradient_checkpointing
    return model


def _train_features(args: argparse.Namespace, tokenizer: Tokenizer, world: World) -> FeatureStore:
    """The training set; with a cache the first process builds it and all map it."""
    from minilm_fast.data.feature_cache import build_cache, datasets_installed, open_cache
    from minilm_fast.data.features import read_features
    from minilm_fast.data.parallel import process_count

    size = args.train_file.stat().st_size if args.train_file.is_file() else 0
    workers = process_count(args.preprocessing_num_workers, size)
    cache = args.cached_train_features_file
    if cache is None:
        if not datasets_installed() or not args.train_file.is_file():
            return read_features(args.train_file, tokenizer, workers)
        cache = args.output_dir / "cached_features_for_training.arrow"
    world.on_main(lambda: build_cache(args.train_file, tokenizer, cache, num_proc=workers))
    return open_cache(args.train_file, tokenizer, cache)


def _dev_examples(args: argparse.Namespace) -> list[Example]:
    from minilm_fast.data.examples import read_examples

    examples = list(read_examples(args.dev_file)) if args.dev_file else []
    count = min(args.max_dev_examples, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _generation(args: argparse.Namespace, examples: Sequence[Example]) -> Generation | None:
    from minilm_fast.metrics import generation_scores
    from minilm_fast.metrics.normalize import join_wordpieces
    from minilm_fast.modeling.model import Model
    from minilm_fast.training.generation import Generation, Source

    if args.dev_task is None:
        return None
    if not examples:
        raise UserError("--dev_task needs --dev_file")
    chosen = examples[: args.max_dev_generate]
    limits = {"max_tgt_length": args.max_target_seq_length, "pos_shift": args.mask_way == "v0"}
    limits["max_seq_length"] = args.max_source_seq_length + args.max_target_seq_length

    def decode(folder: Path, sources: Sequence[Source]) -> list[str]:
        model = Model.from_pretrained(folder)
        dtype = "bf16" if args.bf16 else "fp32"
        return [result.text for result in model.generate(sources, dtype=dtype, beam_size=args.dev_beam_size, **limits)]

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return generation_scores(args.dev_task, predictions, references)

    # Now, and not at the first checkpoint, is the time to find that a package is missing.
    known = {"dev_loss", *(f"dev_{name}" for name in score(["a b c d"], [["a b c d"]]))}
    if args.metric_for_best_model is not None and args.metric_for_best_model not in known:
        raise UserError(f"--metric_for_best_model must be one of {', '.join(sorted(known))}")
    references = [[e.target if isinstance(e.target, str) else join_wordpieces(e.target)] for e in chosen]
    return Generation([e.source for e in chosen], references, decode, score)


def _best_metric(args: argparse.Namespace) -> str:
    from minilm_fast.metrics import best_metric

    if args.metric_for_best_model is not None:
        return str(args.metric_for_best_model)
    return "dev_loss" if args.dev_task is None else f"dev_{best_metric(args.dev_task)}"


def _task_options(args: argparse.Namespace) -> Seq2SeqOptions:
    from minilm_fast.data.masking import Masking
    from minilm_fast.training.seq2seq import Seq2SeqOptions

    masking = Masking(args.random_prob, args.keep_prob, args.source_mask_prob, args.target_mask_prob)
    names = Seq2SeqOptions.__dataclass_fields__.keys() - {"masking", "pad_to_multiple_of"}
    multiple = 64 if args.bf16 or args.fp16 else 1
    values = {name: getattr(args, name) for name in names}
    return Seq2SeqOptions(masking=masking, pad_to_multiple_of=multiple, **values)


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the weights depend on beside the options of loop and data."""
    names = ("model_type", "model_name_or_path", "config_name", "tokenizer_name", "do_lower_case")
    values = {name: getattr(args, name) for name in (*names, "fix_word_embedding", "label_smoothing")}
    for name in ("model_name_or_path", "config_name", "tokenizer_name"):
        values[name] = known_by(values[name])
    return values


def _describe(features: FeatureStore, masker: Masker) -> None:
    sources, targets = masker.truncated(*features.lengths())
    counts = features.counts
    logger.info(
        "%d sources and %d targets are over their limits and cut; %d of %d tokens are unknown to the vocabulary",
        sources, targets, counts.unknown, counts.tokens,
    )  # fmt: skip


def make_trainer(args: argparse.Namespace, world: World | None = None) -> Trainer:
    """Everything that :meth:`Trainer.train` needs, read and checked.

    Args:
        world: connected; by default this process is alone.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.data.feature_cache import digest_of
    from minilm_fast.data.features import make_features, special_ids
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer
    from minilm_fast.training.seq2seq import Seq2SeqTask

    world = world or World({}, cuda=not args.no_cuda)
    torch.manual_seed(args.seed)
    tokenizer, resolved = _tokenizer_and_weights(args)
    model = _load_model(args, resolved, tokenizer)
    special = special_ids(tokenizer)
    dev = _dev_examples(args)
    generation = _generation(args, dev)
    features = _train_features(args, tokenizer, world)
    logger.info("%d training examples, %d dev examples", len(features), len(dev))
    identity = _identity(args) | {"train_file": digest_of(args.train_file)}
    dev_features = make_features(dev, tokenizer)
    options = _task_options(args)
    task = Seq2SeqTask(model, tokenizer, special, features, dev_features, options, world, identity, generation)
    _describe(features, task.masker)
    steps = args.num_training_steps
    if steps <= 0:
        steps = task.batches.steps_in(args.num_training_epochs)
    loop = loop_options(args, total_steps=steps, metric_for_best_model=_best_metric(args))
    return Trainer(task, loop, args.output_dir, world)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_training(build_parser().parse_args(argv), make_trainer, _check)


def _check(args: argparse.Namespace) -> None:
    if args.max_source_seq_length < 3:
        raise UserError("--max_source_seq_length must be at least 3")
    if args.max_target_seq_length < 2:
        raise UserError("--max_target_seq_length must be at least 2")
    if not 0 <= args.label_smoothing < 1:
        raise UserError("--label_smoothing must be at least 0 and below 1")
    for name in ("random_prob", "keep_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} must be between 0 and 1")
    if args.keep_prob + args.random_prob > 1:
        raise UserError(f"--keep_prob {args.keep_prob} and --random_prob {args.random_prob} are more than 1 together")
    for name in ("source_mask_prob", "target_mask_prob"):
        if not -1 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} must be between 0 and 1, or negative for none")
    metric = args.metric_for_best_model
    if metric is not None and args.dev_file is None:
        raise UserError("--metric_for_best_model needs --dev_file")
    if metric not in (None, "dev_loss") and args.dev_task is None:
        raise UserError(f"--metric_for_best_model {metric}: without --dev_task only dev_loss is measured")


if __name__ == "__main__":
    leave(main())

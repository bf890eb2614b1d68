"""Distil a student from a teacher of the BERT family, MiniLM v1 or v2: ``python -m minilm_fast.distill``."""

from __future__ import annotations

import argparse
import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm_fast.cli import ArgumentParser, leave, run_training
from minilm_fast.errors import UserError
from minilm_fast.training.flags import add_loop_flags, known_by, loop_options, non_negative_float, positive_int

if TYPE_CHECKING:
    import numpy as np

    from minilm_fast.checkpoint import LoadedCheckpoint
    from minilm_fast.config import Config
    from minilm_fast.data.corpus import Corpus
    from minilm_fast.data.corpus_cache import PackedSequences
    from minilm_fast.distillation.student import Student
    from minilm_fast.tokenization import Tokenizer
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import Trainer

logger = logging.getLogger("minilm_fast.distill")  # the name is __main__ under python -m

TRAIN = "train"


def layer_list(text: str) -> list[int]:
    """Layer numbers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 0,2,4") from None


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="minilm_fast.distill",
        description=__doc__,
        epilog="Without --learning_rate, --num_warmup_steps, --num_training_steps and --gradient_accumulation_steps "
        "the papers' values are taken: docs/distillation.md.",
    )
    add = parser.add_argument
    add("--teacher", required=True, help="checkpoint: folder, weights file or hub id")
    add("--output_dir", required=True, type=Path, help="checkpoints ckpt-N go here; a run found here is resumed")
    add("--teacher_config", help="configuration file in place of the teacher's own")
    add("--tokenizer_name", help="vocabulary or tokenizer folder in place of the teacher's own")
    add("--do_lower_case", action="store_true", help="uncased vocabulary, if the teacher does not say so")
    add("--cache_dir", help="where downloads from the hub are kept")
    add("--save_format", choices=("safetensors", "bin", "both"), default="safetensors", help="of the weights")
    _add_student_flags(parser)
    _add_loss_flags(parser)
    _add_data_flags(parser)
    add_loop_flags(parser)
    # The papers' values depend on the preset and on one another: see fill_defaults.
    parser.set_defaults(
        per_gpu_train_batch_size=32,
        gradient_accumulation_steps=None,
        learning_rate=None,
        adam_epsilon=1e-6,
        num_training_epochs=None,
        num_warmup_steps=None,
    )
    return parser


def _add_student_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "student", "sizes, a configuration or a checkpoint; by default the teacher's sizes"
    )
    add = group.add_argument
    add("--student", help="checkpoint to start from")
    add("--student_config", type=Path, help="configuration file; the weights start at random")
    for owner in ("student", "assistant"):
        default = "student's" if owner == "assistant" else "teacher's"
        layers = "teacher's" if owner == "assistant" else default
        add(f"--{owner}_layers", type=positive_int, metavar="N", help=f"default: the {layers}")
        add(f"--{owner}_hidden_size", type=positive_int, metavar="N", help=f"default: the {default}")
        add(f"--{owner}_heads", type=positive_int, metavar="N", help=f"attention heads; default: the {default}")
        add(f"--{owner}_intermediate_size", type=positive_int, metavar="N", help="default: 4 times the hidden size")
    add("--init_from_layers", type=layer_list, metavar="0,2,4", help="start from the teacher's layers and embeddings")
    add("--dropout", type=float, help="of the student, instead of its configuration's")
    add(
        "--assistant",
        metavar=f"CHECKPOINT|{TRAIN}",
        help=f"distil from this one, or {TRAIN} one from the teacher first",
    )
    add("--assistant_steps", type=positive_int, metavar="N", help="optimiser steps; default: as many as the student")


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loss").add_argument
    add("--preset", choices=("v1", "v2"), default="v2", help="MiniLM or MiniLMv2: relations, layer, learning rate")
    add("--relations", metavar="qk:1,vv:1", help="pairs of q, k, v with weights, instead of the preset's")
    add("--relation_heads", type=positive_int, metavar="N", help="v1: the attention heads; v2: 48, or 64 if large")
    add("--teacher_layer", type=positive_int, metavar="N", help="from 1; default: the last (v2, 24 layers: 21 or 19)")
    add("--student_layer", type=positive_int, metavar="N", help="from 1; default: the last")
    add("--mlm_weight", type=non_negative_float, default=0.0, help="of a masked-language-model loss beside it")


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corpus")
    add = group.add_argument
    add("--train_file", nargs="+", metavar="FILE", help="text, .jsonl, .csv, .tsv, maybe .gz or .xz; patterns too")
    add("--dataset_name", help="a data set of the package datasets, instead of files; read as a stream")
    add("--dataset_config", help="its configuration")
    add("--dataset_split", default="train", help="its split")
    add("--dataset_revision", help="its branch, tag or commit")
    add("--text_field", default="text", help="field of records, column of tables")
    add("--documents", choices=("blank_line", "line"), default="blank_line", help="what ends a document of a text file")
    add("--max_seq_length", type=positive_int, default=512, help="tokens, [CLS] and [SEP] included")
    add("--corpus_cache", type=Path, help="Arrow file of the tokens; default: OUTPUT_DIR/corpus.arrow")
    add("--preprocessing_num_workers", type=positive_int, help="processes that tokenise; default: by the files' size")
    add("--dev_file", nargs="+", metavar="FILE", help="its relation losses are measured at every checkpoint")
    add("--max_dev_sequences", type=positive_int, default=200, help="use this many, spread over the files")


@dataclass(frozen=True)
class Hop:
    """One distillation: from whom, to what, for how long.

    Args:
        role: ``"student"`` or ``"assistant"``.
        teacher: name of the checkpoint.
        teacher_layer: from 1; None leaves it to the preset.
    """

    role: str
    teacher: str
    loaded: LoadedCheckpoint
    teacher_layer: int | None
    student: Student
    steps: int
    output_dir: Path


def _load_teacher(args: argparse.Namespace, name: str, config: str | None) -> tuple[LoadedCheckpoint, Tokenizer]:
    from minilm_fast.training.loading import load_with_tokenizer

    return load_with_tokenizer(
        name,
        config_name=config,
        tokenizer_name=args.tokenizer_name,
        cache_dir=args.cache_dir,
        do_lower_case=args.do_lower_case or None,
        max_seq_length=args.max_seq_length,
    )


def _sizes(args: argparse.Namespace, owner: str) -> dict[str, int | None]:
    return {name: getattr(args, f"{owner}_{name}") for name in ("layers", "hidden_size", "heads", "intermediate_size")}


def _with_dropout(args: argparse.Namespace, config: Config) -> Config:
    if args.dropout is None:
        return config
    return config.replace(hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout)


def _student_config(args: argparse.Namespace, teacher: Config) -> Config:
    from minilm_fast.config import Config
    from minilm_fast.distillation.student import student_config

    if args.student_config is not None:
        config = Config.from_file(args.student_config)
        if config.vocab_size != teacher.vocab_size:
            raise UserError(
                f"{args.student_config}: vocab_size {config.vocab_size}, the teacher has {teacher.vocab_size} words"
            )
        if config.max_position_embeddings < args.max_seq_length:
            raise UserError(f"{args.student_config}: {config.max_position_embeddings} positions are too few")
        return config
    sizes = _sizes(args, "student")
    if args.init_from_layers is not None and sizes["layers"] is None:
        sizes["layers"] = len(args.init_from_layers)
    return student_config(teacher, **sizes)


def _make_student(args: argparse.Namespace, teacher: LoadedCheckpoint, tokenizer: Tokenizer) -> Student:
    from minilm_fast import checkpoint
    from minilm_fast.distillation.student import Student, copy_layers

    with_head = args.mlm_weight > 0
    if args.student is None:
        student = Student(_with_dropout(args, _student_config(args, teacher.config)), with_head=with_head)
        if args.init_from_layers is not None:
            copy_layers(student, teacher.config, teacher.state, args.init_from_layers)
        return student
    resolved = checkpoint.resolve(args.student, cache_dir=args.cache_dir)
    loaded = checkpoint.load(resolved.weights, config=resolved.config, for_training=True, fold_token_types=True)
    _check_same_tokenizer(args.student, loaded, resolved.tokenizer, tokenizer)
    if loaded.config.max_position_embeddings < args.max_seq_length:
        raise UserError(f"--student {args.student}: {loaded.config.max_position_embeddings} positions are too few")
    student = Student(_with_dropout(args, loaded.config), with_head=with_head)
    student.load_checkpoint_state(loaded.state, f"--student {args.student}")
    return student


def _check_same_tokenizer(name: str, loaded: LoadedCheckpoint, own: str | None, teacher: Tokenizer) -> None:
    from minilm_fast.tokenization import Tokenizer

    if own is not None:
        record = Tokenizer.from_pretrained(own, model_type=loaded.config.model_type).record()
        if record["sha256"] != teacher.record()["sha256"]:
            raise UserError(f"--student {name}: its vocabulary is not the teacher's: both must read the same tokens")
    if loaded.config.vocab_size < teacher.vocab_size:
        raise UserError(
            f"--student {name}: {loaded.config.vocab_size} words, the teacher's vocabulary has {teacher.vocab_size}"
        )


def _corpus(args: argparse.Namespace) -> Corpus:
    from minilm_fast.data.corpus import DatasetCorpus, FileCorpus, expand

    if args.dataset_name is not None:
        return DatasetCorpus(
            args.dataset_name, args.dataset_config, args.dataset_split, args.dataset_revision, args.text_field
        )
    return FileCorpus(expand(args.train_file), args.text_field, args.documents)


def _sequences(
    args: argparse.Namespace, corpus: Corpus, tokenizer: Tokenizer, cache: Path, world: World
) -> PackedSequences:
    """The corpus, tokenised by the first process and mapped by all."""
    from minilm_fast.data.corpus_cache import PackedSequences, TokenisedCorpus, build_corpus
    from minilm_fast.data.parallel import process_count

    size = sum(os.path.getsize(path) for path in getattr(corpus, "paths", ()))
    workers = process_count(args.preprocessing_num_workers, size)

    def build() -> None:
        build_corpus(corpus, tokenizer, cache, num_proc=workers)

    world.on_main(build)
    return PackedSequences(TokenisedCorpus(cache), tokenizer, args.max_seq_length)


def _dev_sequences(args: argparse.Namespace, tokenizer: Tokenizer, world: World) -> list[np.ndarray]:
    from minilm_fast.data.corpus import FileCorpus, expand

    if not args.dev_file:
        return []
    corpus = FileCorpus(expand(args.dev_file), args.text_field, args.documents)
    sequences = _sequences(args, corpus, tokenizer, args.output_dir / "dev.arrow", world)
    count = min(args.max_dev_sequences, len(sequences))
    return [sequences[i * len(sequences) // count] for i in range(count)]


def _identity(args: argparse.Namespace, hop: Hop, sequences: PackedSequences) -> dict[str, Any]:
    """What the weights depend on beside the options of loop and task."""
    config = hop.student.config
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_dropout_prob")
    start = args.student if hop.role == "student" else None
    return {
        "teacher": known_by(hop.teacher),
        "student": known_by(start),
        "student's sizes": [getattr(config, name) for name in sizes],
        "init_from_layers": args.init_from_layers if hop.role == "student" else None,
        "max_seq_length": args.max_seq_length,
        "train_file": f"sha256 {sequences.corpus.digest[:16]}",
    }


def _trainer(
    args: argparse.Namespace,
    hop: Hop,
    tokenizer: Tokenizer,
    sequences: PackedSequences,
    dev: Sequence[np.ndarray],
    world: World,
) -> Trainer:
    from minilm_fast.distillation import Distiller, FrozenEncoder
    from minilm_fast.distillation.presets import LEARNING_RATES, accumulation, pairing, warmup_steps
    from minilm_fast.distillation.student import parameter_count
    from minilm_fast.distillation.task import DistillOptions, DistillTask
    from minilm_fast.training.loop import Trainer

    teacher, student = hop.loaded.config, hop.student
    student.bert.gradient_checkpointing = args.gradient_checkpointing
    pair = pairing(args.preset, teacher, student.config, args.relation_heads, hop.teacher_layer)
    half = args.bf16 or args.fp16
    frozen = FrozenEncoder(
        teacher, hop.loaded.state, layer=pair.teacher_layer, dtype="bf16" if half else "fp32", device=world.device
    )
    distiller = Distiller(
        frozen,
        student,
        args.relations or args.preset,
        relation_heads=pair.relation_heads,
        student_layer=args.student_layer if hop.role == "student" else None,
    )
    logger.info(
        "%s: %d layers, hidden size %d, %.1f million parameters; %s, %d relation heads, layer %d of the teacher's %d",
        hop.role,
        student.config.num_hidden_layers,
        student.config.hidden_size,
        parameter_count(student.config) / 1e6,
        " + ".join(f"{relation.weight:g} {relation.name}" for relation in distiller.relations),
        distiller.relation_heads,
        distiller.teacher_layer,
        teacher.num_hidden_layers,
    )
    count = args.gradient_accumulation_steps or accumulation(args.per_gpu_train_batch_size, world.size)
    options = DistillOptions(
        per_gpu_train_batch_size=args.per_gpu_train_batch_size,
        gradient_accumulation_steps=count,
        seed=args.seed,
        mlm_weight=args.mlm_weight,
        pad_to_multiple_of=64 if half else 1,
        save_format=args.save_format,
    )
    task = DistillTask(distiller, teacher, tokenizer, sequences, dev, options, world, _identity(args, hop, sequences))
    loop = loop_options(
        args,
        total_steps=hop.steps,
        learning_rate=args.learning_rate or LEARNING_RATES[args.preset],
        num_warmup_steps=warmup_steps(hop.steps) if args.num_warmup_steps is None else args.num_warmup_steps,
        metric_for_best_model=args.metric_for_best_model or "dev_loss",
    )
    return Trainer(task, loop, hop.output_dir, world)


def _steps(args: argparse.Namespace, sequences: PackedSequences, world: World) -> int:
    from minilm_fast.distillation.presets import STEPS, accumulation
    from minilm_fast.training.seq2seq import steps_of_epochs

    if args.num_training_steps > 0:
        return int(args.num_training_steps)
    if args.num_training_epochs is None:
        return STEPS
    count = args.gradient_accumulation_steps or accumulation(args.per_gpu_train_batch_size, world.size)
    return steps_of_epochs(len(sequences), args.num_training_epochs, args.per_gpu_train_batch_size * count * world.size)


def make_trainer(args: argparse.Namespace, world: World | None = None) -> Trainer:
    """Everything that :meth:`Trainer.train` needs, read and checked; an assistant is trained before.

    Args:
        world: connected; by default this process is alone.

    Raises:
        UserError: a file or a flag is wrong.
    """
    import torch

    from minilm_fast.training.distributed import World

    world = world or World({}, cuda=not args.no_cuda)
    existing = args.assistant not in (None, TRAIN)
    name, config = (args.assistant, None) if existing else (args.teacher, args.teacher_config)
    teacher, tokenizer = _load_teacher(args, name, config)
    torch.manual_seed(args.seed)
    # Made before the corpus is read, so that what does not fit is found at once.
    student = _make_student(args, teacher, tokenizer)
    _check_pair(args, teacher.config, student.config)
    sequences = _sequences(args, _corpus(args), tokenizer, args.corpus_cache or args.output_dir / "corpus.arrow", world)
    dev = _dev_sequences(args, tokenizer, world)
    logger.info("%d training sequences, %d dev sequences", len(sequences), len(dev))
    steps = _steps(args, sequences, world)
    if args.assistant == TRAIN:
        name = str(_train_assistant(args, teacher, student.config, tokenizer, sequences, dev, steps, world))
        teacher, _ = _load_teacher(args, name, None)
    # Training draws the same numbers however the models came about.
    torch.manual_seed(args.seed)
    # An assistant has learnt to do in its last layer what its teacher does in the distilled one.
    last = teacher.config.num_hidden_layers
    layer = args.teacher_layer if args.assistant is None else last
    hop = Hop("student", name, teacher, layer, student, steps, args.output_dir)
    return _trainer(args, hop, tokenizer, sequences, dev, world)


def _train_assistant(
    args: argparse.Namespace,
    teacher: LoadedCheckpoint,
    student: Config,
    tokenizer: Tokenizer,
    sequences: PackedSequences,
    dev: Sequence[np.ndarray],
    student_steps: int,
    world: World,
) -> Path:
    """The first of two hops (MiniLM, section 3.3): by default the teacher's depth and the student's width.

    Returns:
        The folder of the assistant's last checkpoint.
    """
    from minilm_fast.distillation.student import Student, student_config
    from minilm_fast.training.checkpointing import checkpoint_folder, run_folder

    sizes = _sizes(args, "assistant")
    sizes["hidden_size"] = sizes["hidden_size"] or student.hidden_size
    sizes["heads"] = sizes["heads"] or student.num_attention_heads
    if sizes["hidden_size"] == student.hidden_size:
        sizes["intermediate_size"] = sizes["intermediate_size"] or student.intermediate_size
    config = _with_dropout(args, student_config(teacher.config, **sizes))
    _check_pair(args, teacher.config, config)
    steps = args.assistant_steps or student_steps
    output_dir = args.output_dir / "assistant"
    assistant = Student(config, with_head=args.mlm_weight > 0)
    hop = Hop("assistant", args.teacher, teacher, args.teacher_layer, assistant, steps, output_dir)
    with run_folder(world, output_dir) as folder:
        trainer = _trainer(args, hop, tokenizer, sequences, dev, world)
        trainer.prepare(folder, overwrite=args.overwrite_output_dir)
        trainer.train()
    del trainer, hop, assistant
    gc.collect()
    return checkpoint_folder(output_dir, steps)


def _check_pair(args: argparse.Namespace, teacher: Config, student: Config) -> None:
    """What can be told from the configurations; the distiller checks the rest."""
    theirs, own = teacher.num_attention_heads, student.num_attention_heads
    if args.preset == "v1" and args.relation_heads is None and theirs != own:
        raise UserError(
            f"--preset v1 transfers the attention of each head: the teacher has {theirs} heads, the student {own}; "
            f"give --student_heads {theirs} or --relation_heads"
        )
    if args.relation_heads is not None:
        for role, config in (("teacher", teacher), ("student", student)):
            if config.hidden_size % args.relation_heads:
                raise UserError(
                    f"--relation_heads {args.relation_heads} does not divide the {role}'s hidden size of "
                    f"{config.hidden_size}"
                )
    for role, config in (("teacher", teacher), ("student", student)):
        layer = getattr(args, f"{role}_layer")
        if layer is not None and layer > config.num_hidden_layers:
            raise UserError(f"--{role}_layer {layer}: the {role} has layers 1 to {config.num_hidden_layers}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_training(build_parser().parse_args(argv), make_trainer, _check)


def _check(args: argparse.Namespace) -> None:
    from minilm_fast.distillation.relations import parse_relations

    if (args.train_file is None) == (args.dataset_name is None):
        raise UserError("give the corpus by either --train_file or --dataset_name")
    if args.max_seq_length < 3:
        raise UserError("--max_seq_length must be at least 3")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise UserError("--dropout must be at least 0 and below 1")
    relations = parse_relations(args.preset if args.relations is None else args.relations)
    measures = ["dev_loss", *(f"dev_{relation.name}" for relation in relations)]
    if args.metric_for_best_model is not None and not args.dev_file:
        raise UserError("--metric_for_best_model needs --dev_file")
    if args.metric_for_best_model not in (None, *measures):
        raise UserError(f"--metric_for_best_model {args.metric_for_best_model}: not one of {', '.join(measures)}")
    chosen = [name for name in ("student", "student_config") if getattr(args, name) is not None]
    sized = [f"student_{name}" for name, value in _sizes(args, "student").items() if value is not None]
    if len(chosen) > 1 or (chosen and sized):
        other = sized[0] if sized else chosen[1]
        raise UserError(f"--{chosen[0]} and --{other} exclude one another")
    if args.student is not None and args.init_from_layers is not None:
        raise UserError("--student and --init_from_layers exclude one another")
    if args.assistant != TRAIN:
        given = [name for name, value in _sizes(args, "assistant").items() if value is not None]
        if given or args.assistant_steps is not None:
            raise UserError(f"--assistant_{given[0] if given else 'steps'} needs --assistant {TRAIN}")
    if args.assistant is not None and args.init_from_layers is not None:
        raise UserError("--init_from_layers and --assistant exclude one another")


if __name__ == "__main__":
    leave(main())

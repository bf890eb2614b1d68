"""run_glue: every task's files, training, choosing a checkpoint, predictions, and what goes wrong."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Runner
from understanding_files import (
    MODEL,
    RUN,
    WORDS,
    arguments,
    error_line,
    results,
    sentences,
    write_table,
    write_vocabulary,
)

from minilm_fast import checkpoint, run_glue
from minilm_fast.data.glue import GLUE_TASKS, read_glue, read_glue_test
from minilm_fast.run_glue import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capfdbinary: Any) -> Runner:
    return Runner(capfdbinary)


# Headers as in the download: training and development files, test files.
HEADERS = {
    "cola": ("", "index\tsentence"),
    "mnli": ("index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label", "index\tgenre\tsentence1\tsentence2"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "index\t#1 ID\t#2 ID\t#1 String\t#2 String"),
    "qnli": ("index\tquestion\tsentence\tlabel", "index\tquestion\tsentence"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "id\tquestion1\tquestion2"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "index\tsentence1\tsentence2"),
    "sst-2": ("sentence\tlabel", "index\tsentence"),
    "sts-b": ("index\tgenre\tsentence1\tsentence2\tscore", "index\tgenre\tsentence1\tsentence2"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "index\tsentence1\tsentence2"),
}
TEXTS = {"sentence1", "question1", "#1 String", "question"}, {"sentence2", "question2", "#2 String", "sentence"}
LABELS = {"label", "gold_label", "is_duplicate", "Quality", "score"}


def rows(task: str, header: str, count: int, seed: int) -> list[list[str]]:
    spec = GLUE_TASKS[task]
    found = []
    for number, (first, second, kind) in enumerate(sentences(count, 3 if task == "mnli" else 2, seed)):
        label = f"{4.5 * kind + 0.25:.2f}" if spec.regression else spec.labels[kind]
        if not header:
            found.append(["gj04", label, "", f"{first} {second}"])
            continue
        values = dict.fromkeys(TEXTS[0], first) | dict.fromkeys(TEXTS[1], second)
        values |= dict.fromkeys(LABELS, label) | {"index": str(number), "id": str(number)}
        found.append([values.get(name, "x") for name in header.split("\t")])
    return found


def write_task(folder: Path, task: str, train: int = 120, dev: int = 60) -> None:
    """The files of a task as they are downloaded."""
    spec, (header, test_header) = GLUE_TASKS[task], HEADERS[task]
    write_table(folder / spec.name / "train.tsv", header, rows(task, header, train, 0))
    for number, stem in enumerate(spec.dev.values(), 1):
        write_table(folder / spec.name / f"{stem}.tsv", header, rows(task, header, dev, number))
    for number, stem in enumerate(spec.submissions.values(), 3):
        write_table(folder / spec.name / f"{stem}.tsv", test_header, rows(task, test_header, 12, number))


def test_the_parser_knows_all_tasks() -> None:
    assert set(run_glue.TASKS) == GLUE_TASKS.keys() == HEADERS.keys()


@pytest.mark.parametrize("task", HEADERS)
def test_files_and_submissions(task: str, tmp_path: Path, run: Runner) -> None:
    """A training of one step, so that every task's files go through everything once."""
    write_vocabulary(tmp_path)
    write_task(tmp_path / "data", task, train=20, dev=20)
    flags = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 1}
    outcome = run(main, *arguments(tmp_path, task_name=task.upper(), **(RUN | flags)))
    assert outcome.status == 0, outcome
    spec = GLUE_TASKS[task]
    found = results(tmp_path / "out")
    assert {f"dev_{name}" for name in ("loss", *spec.metrics)} <= found["measures"].keys()
    if task == "mnli":
        assert found["metric"] == "dev_matched_accuracy" and "dev_mismatched_accuracy" in found["measures"]
    for name in spec.submissions:
        lines = (tmp_path / "out" / f"{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction"
        numbers, predictions = zip(*(line.split("\t") for line in lines[1:]), strict=True)
        assert numbers == tuple(str(i) for i in range(12))
        if spec.regression:
            assert all(0 <= float(p) <= 5 and len(p.split(".")[1]) == 3 for p in predictions)
        else:
            assert set(predictions) <= set(spec.labels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on RTE's files that measured its checkpoints at the end."""
    folder = tmp_path_factory.mktemp("glue")
    write_vocabulary(folder)
    write_task(folder / "data", "rte")
    flags = {"do_train": True, "do_eval": True, "do_predict": True, "eval_all_checkpoints": True}
    assert main(arguments(folder, task_name="rte", **(RUN | flags))) == 0
    return folder


def test_it_learns_and_the_best_is_kept(trained: Path) -> None:
    found = results(trained / "out")
    values = {name: measures["dev_accuracy"] for name, measures in found["checkpoints"].items()}
    assert list(values) == ["ckpt-10", "ckpt-20", "ckpt-30"]
    assert found["measures"]["dev_accuracy"] == max(values.values()) >= 0.9
    assert found["checkpoint"] == max(values, key=lambda name: values[name])
    assert os.readlink(trained / "out" / "best") == found["checkpoint"]
    text = (trained / "out" / "eval_results.txt").read_text()
    assert f"dev_accuracy = {found['measures']['dev_accuracy']}\n" in text
    # The training itself measured nothing.
    assert "dev_accuracy" not in (trained / "out" / "history.json").read_text()


def test_the_output_folder_is_a_checkpoint_of_transformers(trained: Path) -> None:
    """Its predictions, from transformers' own model and padding, are ours."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(trained / "out").eval()
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    vocabulary = {word: 5 + i for i, word in enumerate(WORDS)}
    _, examples = read_glue_test(trained / "data" / "RTE" / "test.tsv", "rte")
    lines = (trained / "out" / "RTE.tsv").read_text().splitlines()[1:]
    for example, line in zip(examples, lines, strict=True):
        first, second = ([vocabulary[word] for word in text.split()] for text in example.texts)
        ids = torch.tensor([[2, *first, 3, *second, 3]])
        types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
        with torch.no_grad():
            number = model(ids, token_type_ids=types).logits.argmax().item()
        assert line.split("\t")[1] == model.config.id2label[number]


def test_evaluation_without_training(trained: Path, tmp_path: Path) -> None:
    """Of the folder of a run, and of any checkpoint into another folder."""
    expected = results(trained / "out")
    shutil.copytree(trained / "out", tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / "eval_results.json").unlink()
    flags = {"task_name": "rte", "max_seq_length": 20, "do_eval": True}
    assert main(arguments(trained, output_dir=tmp_path / "copy", **flags)) == 0
    assert results(tmp_path / "copy")["measures"] == pytest.approx(expected["measures"], abs=1e-6)
    model = {"model_name_or_path": trained / "out" / "ckpt-10", "tokenizer_name": None}
    assert main(arguments(trained, output_dir=tmp_path / "other", **flags, **model)) == 0
    assert results(tmp_path / "other")["measures"] == pytest.approx(expected["checkpoints"]["ckpt-10"], abs=1e-6)
    assert not (tmp_path / "other" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "copy" / "ckpt-20")
    assert main(arguments(trained, output_dir=tmp_path / "copy", eval_all_checkpoints=True, **flags)) == 0
    assert list(results(tmp_path / "copy")["checkpoints"]) == ["ckpt-10", "ckpt-30"]


def test_measuring_during_training(trained: Path, tmp_path: Path) -> None:
    """The same measures, and the best of them is what is left."""
    expected = results(trained / "out")
    flags = {"do_train": True, "do_eval": True, "evaluate_during_training": True, "per_gpu_eval_batch_size": 7}
    assert main(arguments(trained, task_name="rte", output_dir=tmp_path / "out", **(RUN | flags))) == 0
    found = results(tmp_path / "out")
    assert found["checkpoint"] == expected["checkpoint"]
    assert found["measures"] == pytest.approx(expected["measures"], abs=1e-5)
    assert os.readlink(tmp_path / "out" / "best") == expected["checkpoint"]


def test_resume(trained: Path, tmp_path: Path, run: Runner) -> None:
    """A run that lost its last checkpoint ends with the same bits."""
    shutil.copytree(trained / "out", tmp_path / "out", symlinks=True)
    shutil.rmtree(tmp_path / "out" / "ckpt-30")
    flags = {"output_dir": tmp_path / "out", "do_train": True, "do_eval": True, "eval_all_checkpoints": True}
    outcome = run(main, *arguments(trained, task_name="rte", **(RUN | flags)))
    assert outcome.status == 0 and "resuming after step 20" in outcome.err
    one, two = (checkpoint.load(folder / "ckpt-30") for folder in (trained / "out", tmp_path / "out"))
    for name, tensor in {**one.state, **one.extra_state}.items():
        assert torch.equal(tensor, {**two.state, **two.extra_state}[name]), name
    assert results(tmp_path / "out") == results(trained / "out")
    other = run(main, *arguments(trained, task_name="rte", **(RUN | flags | {"warmup_steps": 3})))
    assert "of another run (--num_warmup_steps 0 there, 3 here)" in error_line(other)


def test_two_processes(trained: Path, tmp_path: Path) -> None:
    """The same training, measures and predictions as one process with twice the accumulation, in bf16 too."""
    flags = {"do_train": True, "do_eval": True, "do_predict": True, "max_steps": 4, "save_steps": 4, "bf16": True}
    flags |= {"per_gpu_train_batch_size": 8, "no_cuda": True}
    common = RUN | flags
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = arguments(trained, task_name="rte", output_dir=tmp_path / "two", **common)
    done = subprocess.run(
        [*launcher, "-m", "minilm_fast.run_glue", *two], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("120 examples in") == done.stderr.count("4 steps of 16 sequences: 0.53 epochs") == 1
    accumulated = {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 2}
    assert main(arguments(trained, task_name="rte", **common, **accumulated)) == 0
    one, other = (results(tmp_path / name)["measures"] for name in ("one", "two"))
    assert other["dev_loss"] == pytest.approx(one["dev_loss"], abs=5e-3)
    submissions = [(tmp_path / name / "RTE.tsv").read_text().splitlines() for name in ("one", "two")]
    assert len(submissions[1]) == 13
    assert sum(a != b for a, b in zip(*submissions, strict=True)) <= 1


def _transformers_model(folder: Path, labels: dict[int, str], regression: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    kind = "regression" if regression else "single_label_classification"
    config = AutoConfig.from_pretrained(MODEL, id2label=labels, problem_type=kind)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, config=config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("task", ["mnli", "sts-b"])
def test_measures_equal_transformers(task: str, tmp_path: Path) -> None:
    """A checkpoint of transformers whose labels have names in an order of their own."""
    labels = {0: "NEUTRAL", 1: "Contradiction", 2: "entailment"} if task == "mnli" else {0: "LABEL_0"}
    model = _transformers_model(tmp_path / "model", labels, regression=task == "sts-b")
    write_vocabulary(tmp_path)
    write_task(tmp_path / "data", task, train=3, dev=30)
    file = tmp_path / "data" / GLUE_TASKS[task].name / next(f"{stem}.tsv" for stem in GLUE_TASKS[task].dev.values())
    model_flags = {"model_name_or_path": tmp_path / "model", "max_seq_length": 20}
    assert main(arguments(tmp_path, task_name=task, do_eval=True, dev_file=file, **model_flags)) == 0
    measures = results(tmp_path / "out")["measures"]
    vocabulary = {word: 5 + i for i, word in enumerate(WORDS)}
    names = [name.lower() for name in labels.values()] if task == "mnli" else None
    losses, right = [], []
    for example in read_glue(file, task, names):
        first, second = ([vocabulary[word] for word in text.split()] for text in example.texts)
        ids = torch.tensor([[2, *first, 3, *second, 3]])
        types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
        label = torch.tensor([example.label]) if task == "mnli" else torch.tensor([[example.label]])
        with torch.no_grad():
            found = model(ids, token_type_ids=types, labels=label)
        losses.append(found.loss.item())
        right.append(found.logits.argmax().item() == example.label)
    assert measures["dev_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    if task == "mnli":
        assert measures["dev_accuracy"] == pytest.approx(np.mean(right))


Breaking = Callable[[Path], dict[str, object]]


def _file(name: str, content: str) -> Breaking:
    def write(folder: Path) -> dict[str, object]:
        (folder / "data" / "RTE" / name).write_text(content)
        return {}

    return write


def _cut_off(folder: Path) -> dict[str, object]:
    path = folder / "data" / "RTE" / "train.tsv"
    packed = lzma.compress(path.read_bytes())
    path.unlink()
    (folder / "data" / "RTE" / "train.tsv.xz").write_bytes(packed[: len(packed) // 2])
    return {}


def _other_vocabulary(folder: Path) -> dict[str, object]:
    (folder / "other.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    return {"tokenizer_name": folder / "other.txt"}


HEADER = "index\tsentence1\tsentence2\tlabel\n"
WRONG: dict[str, tuple[Breaking, str]] = {
    "label": (
        _file("train.tsv", HEADER + "0\tw1\tw2\tentailment\n1\tw1\tw2\tmaybe\n"),
        "train.tsv:3: the label 'maybe'",
    ),
    "column": (_file("dev.tsv", "index\tsentence1\tlabel\n0\tw1\tentailment\n"), "dev.tsv:1: no column 'sentence2'"),
    "empty": (_file("train.tsv", ""), "train.tsv holds no examples"),
    "header only": (_file("dev.tsv", HEADER), "dev.tsv holds no examples"),
    "not UTF-8": (lambda folder: _latin(folder), "train.tsv:2: not UTF-8 text"),
    "cut off": (_cut_off, "train.tsv.xz: the compressed file is cut off"),
    "vocabulary": (_other_vocabulary, "7 tokens, but the checkpoint's embedding has 97 rows"),
    "no file": (lambda folder: {"data_dir": folder / "nowhere"}, "nowhere: no train.tsv there or in RTE"),
    "length": (lambda folder: {"max_seq_length": 500}, "--max_seq_length 500:"),
    "nothing": (lambda folder: {"do_train": None, "do_eval": None}, "nothing to do: give --do_train"),
    "no data": (lambda folder: {"data_dir": None}, "give --data_dir, or --train_file"),
    "metric": (
        lambda folder: {"metric_for_best_model": "dev_f1", "eval_all_checkpoints": True},
        "--metric_for_best_model dev_f1: not one of dev_accuracy, dev_loss",
    ),
    "no classifier": (lambda folder: {"do_train": None}, "no classifier of 2 labels: fine-tune it with --do_train"),
    "task": (lambda folder: {"task_name": "rtf"}, "--task_name"),
}


def _latin(folder: Path) -> dict[str, object]:
    (folder / "data" / "RTE" / "train.tsv").write_bytes(HEADER.encode() + b"0\tw1 \xe9\tw2\tentailment\n")
    return {}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name: str, tmp_path: Path, run: Runner) -> None:
    breaking, message = WRONG[name]
    write_vocabulary(tmp_path)
    write_task(tmp_path / "data", "rte", train=20, dev=20)
    flags = {"task_name": "rte", "do_train": True, "do_eval": True, "max_steps": 2, "save_steps": 1}
    outcome = run(main, *arguments(tmp_path, **(RUN | flags | breaking(tmp_path))))
    assert message in error_line(outcome)


def test_odd_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("sentence1\tsentence2\tgold_label\na\tb\t-\na\nc\td\tneutral\n")
    with pytest.warns(UserWarning) as caught:
        [example] = read_glue(path, "mnli")
    assert example.texts == ("c", "d") and example.label == 2
    messages = " ".join(str(one.message) for one in caught)
    assert "1 line has too few columns" in messages and "1 examples without a decided label" in messages

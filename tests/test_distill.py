"""The distillation program: students, runs, resume, several processes, and what users can get wrong."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.distill import build_parser, main, make_trainer
from minilm_fast.distillation.presets import accumulation, pairing, warmup_steps
from minilm_fast.distillation.student import Student, student_config
from minilm_fast.distillation.task import DistillTask, make_batch, mask_batch
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training import checkpointing
from minilm_fast.training.distributed import World

GOLDENS = Path(__file__).parent / "goldens" / "distillation"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(92)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its vocabulary and a corpus."""
    folder = tmp_path_factory.mktemp("distillation")
    copy_teacher(folder / "teacher")
    write_corpus(folder / "train.txt", seed=0, documents=60)
    write_corpus(folder / "dev.txt", seed=1, documents=12)
    return folder


def copy_teacher(folder: Path, name: str = "teacher", words: list[str] = WORDS, **changes: object) -> Path:
    folder.mkdir()
    config = json.loads((GOLDENS / name / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDENS / name / "model.safetensors", folder)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    return folder


def write_corpus(path: Path, seed: int, documents: int) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(documents)]
    path.write_text("\n\n".join(texts) + "\n")


def arguments(world: Path, out: Path, **flags: object) -> list[str]:
    values: dict[str, object] = {
        "teacher": world / "teacher",
        "train_file": world / "train.txt",
        "output_dir": out,
        "student_layers": 2,
        "student_hidden_size": 24,
        "max_seq_length": 20,
        "num_training_steps": 6,
        "per_gpu_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "logging_steps": 2,
        "peak_tflops": 0.1,
    } | flags
    words = []
    for name, value in values.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def error_of(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    assert main(args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def assert_equal_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_a_run_lowers_the_held_out_losses(world: Path, tmp_path: Path, preset: str) -> None:
    """What is saved loads in transformers, with the teacher's vocabulary, and gives the same hidden states."""
    from transformers import AutoModel, AutoTokenizer

    flags = {"preset": preset, "num_training_steps": 60, "save_steps": 20, "dev_file": world / "dev.txt"}
    args = arguments(world, tmp_path, **flags, learning_rate=3e-3)
    assert main(args) == 0
    records = json.loads((tmp_path / "history.json").read_text())["records"]
    names = {"v1": ["qk", "vv"], "v2": ["qq", "kk", "vv"]}[preset]
    assert {"loss", "dev_loss", *names, *(f"dev_{name}" for name in names)} <= records[0].keys()
    for record in records:
        assert record["dev_loss"] == pytest.approx(sum(record[f"dev_{name}"] for name in names), rel=1e-5)
    losses = [record["dev_loss"] for record in records]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.96 * losses[0]
    folder = tmp_path / "ckpt-60"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (2, 24, 4)
    words = AutoTokenizer.from_pretrained(folder)("w1 w5 unheard", return_tensors="pt")
    assert words["input_ids"].tolist() == [[2, 6, 10, 1, 3]]
    loaded = checkpoint.load(folder)
    student = Student(loaded.config).eval()
    student.load_checkpoint_state(loaded.state, "here")
    batch = make_batch([np.array([2, 6, 10, 1, 3], dtype=np.int32)]).tokens
    with torch.no_grad():
        ours = student.bert(batch.input_ids, batch.position_ids, batch.layout)
        theirs = model(**words).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"bf16": True, "mlm_weight": 0.5}], ids=["plain", "bf16-mlm"])
def test_a_resumed_run_ends_with_the_same_weights(world: Path, tmp_path: Path, extra: dict[str, Any]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = {**extra, "dropout": 0.1, "dev_file": world / "dev.txt", "preset": "v1"}
    for folder in (whole, broken):
        assert main(arguments(world, folder, **flags)) == 0
    shutil.rmtree(broken / "ckpt-6")
    assert checkpointing.latest_step(broken) == 3
    assert main(arguments(world, broken, **flags)) == 0
    assert_equal_weights(whole / "ckpt-6", broken / "ckpt-6")
    assert (whole / "history.json").read_bytes() == (broken / "history.json").read_bytes()


def spawn(args: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "minilm_fast.distill", *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def test_a_killed_run_ends_with_the_same_weights(world: Path, tmp_path: Path) -> None:
    steps = {"num_training_steps": 60, "save_steps": 20, "dropout": 0.1}
    process = spawn(arguments(world, tmp_path / "killed", **steps))
    while not (tmp_path / "killed" / "ckpt-20").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (checkpointing.latest_step(tmp_path / "killed") or 60) < 60
    assert main(arguments(world, tmp_path / "killed", **steps)) == 0
    assert main(arguments(world, tmp_path / "whole", **steps)) == 0
    assert_equal_weights(tmp_path / "whole" / "ckpt-60", tmp_path / "killed" / "ckpt-60")


def test_two_processes_equal_one(world: Path, tmp_path: Path) -> None:
    """The same global batch, once accumulated by one process, once shared by two."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    flags = {"dropout": 0, "dev_file": world / "dev.txt"}
    args = arguments(world, tmp_path / "two", **flags)
    processes = [spawn(args, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.communicate()[1]
    assert main(arguments(world, tmp_path / "one", **flags, gradient_accumulation_steps=2)) == 0
    assert_equal_weights(tmp_path / "one" / "ckpt-6", tmp_path / "two" / "ckpt-6", 2e-5)
    one, two = (json.loads((tmp_path / n / "history.json").read_text())["records"] for n in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_goldens_through_the_program(tmp_path: Path) -> None:
    """Teacher and student checkpoints and a corpus in, the published loss and gradients out."""
    golden = json.loads((GOLDENS / "distillation.json").read_text())
    copy_teacher(tmp_path / "teacher")
    copy_teacher(tmp_path / "student", "student")
    rows = [
        [i for i, m in zip(ids, mask, strict=True) if m]
        for ids, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)
    ]
    (tmp_path / "train.txt").write_text("w1\n")
    letters = " qkv"
    for case in golden["cases"]:
        flags = {
            "student": tmp_path / "student",
            "relations": ",".join(f"{letters[a]}{letters[b]}:{weight}" for (a, b), weight in case["relations"]),
            "student_layers": None,
            "student_hidden_size": None,
            **{name: case[name] for name in ("relation_heads", "teacher_layer", "student_layer")},
        }
        trainer = make_trainer(build_parser().parse_args(arguments(tmp_path, tmp_path / "out", **flags)))
        module = trainer.task.module
        parts = module(make_batch([np.array(row, dtype=np.int32) for row in rows]))
        assert parts["loss"].item() == pytest.approx(case["loss"], rel=1e-5), case["name"]
        parts["loss"].backward()
        grads = {n.removeprefix("bert."): p.grad for n, p in module.distiller.student.named_parameters()}
        for name, expected in case["grad_norms"].items():
            norm = 0.0 if grads[name] is None else grads[name].norm().item()
            assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6), (case["name"], name)


def trainer_of(world: Path, out: Path, **flags: object) -> DistillTask:
    return make_trainer(build_parser().parse_args(arguments(world, out, **flags))).task  # type: ignore[return-value]


def test_students_by_size(world: Path, tmp_path: Path) -> None:
    task = trainer_of(world, tmp_path, student_heads=3, student_intermediate_size=40, dropout=0.2)
    config = task.student.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert sizes == (2, 24, 3, 40) and config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.2
    weights = dict(task.student.named_parameters())
    dense = weights["bert.encoder.layer.0.intermediate.dense.weight"]
    assert dense.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert not weights["bert.encoder.layer.0.intermediate.dense.bias"].any()
    assert not weights["bert.embeddings.word_embeddings.weight"][0].any()
    assert (weights["bert.embeddings.LayerNorm.weight"] == 1).all()
    # Behind the last layer's vectors nothing gets a gradient.
    trained = {name for name, param in weights.items() if param.requires_grad}
    last = {name for name in weights if name.startswith("bert.encoder.layer.1.")}
    assert {name.split(".attention.self.")[-1] for name in trained & last} == {
        f"{module}.{kind}" for module in ("query", "key", "value") for kind in ("weight", "bias")
    }
    with_mlm = trainer_of(world, tmp_path, mlm_weight=1.0)
    assert all(param.requires_grad for param in with_mlm.student.parameters())


def test_a_student_of_teacher_layers(world: Path, tmp_path: Path) -> None:
    flags = {"student_layers": None, "student_hidden_size": None, "init_from_layers": "0,2"}
    task = trainer_of(world, tmp_path, **flags)
    own, teacher = task.student.state_dict(), checkpoint.load(world / "teacher").state
    for name, tensor in own.items():
        source = name.replace("encoder.layer.1.", "encoder.layer.2.")
        assert torch.equal(tensor, teacher[source]), name
    assert task.student.config.num_hidden_layers == 2


def test_a_student_by_configuration(world: Path, tmp_path: Path) -> None:
    flags: dict[str, object] = {"student_layers": None, "student_hidden_size": None}
    task = trainer_of(world, tmp_path, **flags, student_config=GOLDENS / "student" / "config.json")
    assert task.student.config.hidden_size == 24 and task.student.config.num_hidden_layers == 2


def test_a_student_forgets_its_teachers_task() -> None:
    extra = {"id2label": {"0": "a"}, "num_labels": 3, "bos_token_id": 0, "minilm_fast": {"tokenizer": {}}}
    teacher = Config(100, 24, 4, 3, 48, model_type="unilm", rel_pos_bins=32, max_rel_pos=128, extra=extra)
    config = student_config(teacher, layers=2)
    assert config.model_type == "minilm" and config.rel_pos_bins == 0 and config.extra == {"bos_token_id": 0}
    assert config.intermediate_size == 48 and student_config(teacher, hidden_size=12).intermediate_size == 48
    assert student_config(teacher, hidden_size=6).intermediate_size == 24


def test_an_assistant_in_between(world: Path, tmp_path: Path) -> None:
    """Two hops in one command equal the same two hops in two commands."""
    flags = {"assistant": "train", "assistant_steps": 4, "teacher_layer": 2, "dropout": 0.1}
    assert main(arguments(world, tmp_path / "both", **flags)) == 0
    assistant = tmp_path / "both" / "assistant" / "ckpt-4"
    config = checkpoint.load(assistant).config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 24)
    first = {"num_training_steps": 4, "student_layers": 3, "teacher_layer": 2, "dropout": 0.1}
    assert main(arguments(world, tmp_path / "first", **first)) == 0
    second = {"assistant": assistant, "dropout": 0.1}
    assert main(arguments(world, tmp_path / "second", **second)) == 0
    assert_equal_weights(tmp_path / "second" / "ckpt-6", tmp_path / "both" / "ckpt-6")
    run = json.loads((tmp_path / "both" / "run.json").read_text())["run"]
    assert run["teacher"] == str(assistant.resolve()) and run["teacher_layer"] == 3
    # A finished first hop is not made again.
    shutil.rmtree(tmp_path / "both" / "ckpt-6")
    stamp = (assistant / "model.safetensors").stat().st_mtime_ns
    assert main(arguments(world, tmp_path / "both", **flags)) == 0
    assert (assistant / "model.safetensors").stat().st_mtime_ns == stamp
    assert_equal_weights(tmp_path / "second" / "ckpt-6", tmp_path / "both" / "ckpt-6")


def test_a_filled_up_batch_has_the_same_loss(world: Path, tmp_path: Path) -> None:
    task = trainer_of(world, tmp_path, mlm_weight=0.5)
    task.module.eval()
    sequences = [task.sequences[i] for i in range(5)]
    masked = []
    for multiple in (1, 64):
        batch = make_batch(sequences, multiple)
        assert batch.tokens.layout.total % multiple == 0
        batch = mask_batch(batch, task.tokenizer, np.random.RandomState(0))
        masked.append({name: value.item() for name, value in task.module(batch).items()})
    assert masked[0] == pytest.approx(masked[1], rel=1e-5)


def test_masking(world: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(world / "teacher")
    rng = np.random.RandomState(0)
    sequences = [np.array([2, *rng.randint(5, 97, 98), 3], dtype=np.int32) for _ in range(200)]
    plain = make_batch(sequences, 64)
    batch = mask_batch(plain, tokenizer, rng)
    before, after = plain.tokens.input_ids, batch.tokens.input_ids
    chosen = torch.zeros(len(before), dtype=torch.bool)
    chosen[batch.predicted] = True
    assert torch.equal(before[~chosen], after[~chosen]) and torch.equal(before[chosen].long(), batch.labels)
    assert not chosen[plain.layout.total :].any() and not chosen[before < 5].any()
    count = len(batch.predicted)
    assert count / (200 * 98) == pytest.approx(0.15, abs=0.01)
    assert (after[chosen] == 4).sum().item() / count == pytest.approx(0.8, abs=0.02)
    assert (after[chosen] == before[chosen]).sum().item() / count == pytest.approx(0.1, abs=0.02)


def test_presets() -> None:
    def of(layers: int, width: int, kind: str = "bert") -> Config:
        return Config(100, width, layers, 2, 8, model_type=kind)

    small = of(6, 384)
    assert pairing("v2", of(12, 768), small, None, None).relation_heads == 48
    assert pairing("v2", of(24, 1024), of(6, 768), None, None).relation_heads == 64
    assert [pairing("v2", of(24, 1024, kind), small, None, None).teacher_layer for kind in ("bert", "roberta")] == [
        21,
        19,
    ]
    assert pairing("v1", of(24, 1024), small, None, None).teacher_layer == 24
    assert pairing("v1", of(12, 768), small, None, None).relation_heads is None
    assert pairing("v2", of(12, 100), of(6, 60), None, 3).relation_heads == 20
    assert [warmup_steps(n) for n in (400_000, 2_000)] == [4_000, 200]
    assert [accumulation(32, 1), accumulation(32, 4), accumulation(512, 1)] == [8, 2, 1]
    args = build_parser().parse_args(["--teacher", "a", "--output_dir", "b"])
    assert args.weight_decay == 0.01 and args.max_seq_length == 512 and args.adam_epsilon == 1e-6


def test_every_sequence_once_an_epoch(world: Path, tmp_path: Path) -> None:
    task = trainer_of(world, tmp_path, gradient_accumulation_steps=3)
    seen: list[tuple[int, ...]] = []
    step = 0
    while len(seen) < len(task.sequences):
        for batch in task.step_data(step).batches:
            bounds = batch.layout.cu_seqlens.tolist()
            ids = batch.tokens.input_ids.tolist()
            seen += [tuple(ids[a:b]) for a, b in itertools.pairwise(bounds)]
        step += 1
    expected = sorted(tuple(sequence.tolist()) for sequence in task.sequences)
    assert sorted(seen[: len(expected)]) == expected
    assert World({}).size == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"relation_heads": 5}, "--relation_heads 5 does not divide the teacher's hidden size of 48"),
        ({"relation_heads": 16}, "--relation_heads 16 does not divide the student's hidden size of 24"),
        ({"teacher_layer": 4}, "--teacher_layer 4: the teacher has layers 1 to 3"),
        ({"student_layer": 3}, "--student_layer 3: the student has layers 1 to 2"),
        ({"preset": "v1", "student_heads": 3}, "--preset v1 transfers the attention of each head"),
        ({"relations": "qx"}, "relation 'qx'"),
        ({"train_file": None}, "either --train_file or --dataset_name"),
        ({"dataset_name": "x"}, "either --train_file or --dataset_name"),
        ({"train_file": "nowhere/*.txt"}, "nowhere/*.txt: no such file"),
        ({"max_seq_length": 24}, "--max_seq_length 24"),
        ({"max_seq_length": 2}, "--max_seq_length must be at least 3"),
        ({"dropout": 1.0}, "--dropout"),
        ({"student_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"student": "x"}, "--student and --student_layers exclude one another"),
        ({"init_from_layers": "0,1,2"}, "--init_from_layers names 3 layers, the student has 2"),
        ({"init_from_layers": "0,1"}, "--init_from_layers needs the teacher's hidden_size of 48"),
        ({"init_from_layers": "0,7", "student_hidden_size": None}, "--init_from_layers 7"),
        ({"assistant_layers": 2}, "--assistant_layers needs --assistant train"),
        ({"assistant_steps": 2}, "--assistant_steps needs --assistant train"),
        ({"assistant": "train", "init_from_layers": "0,1"}, "exclude one another"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
        ({"bf16": True, "fp16": True}, "--fp16 and --bf16"),
        (
            {"metric_for_best_model": "dev_qk", "dev_file": "x"},
            "dev_qk: not one of dev_loss, dev_qq, dev_kk, dev_vv",
        ),
        ({"metric_for_best_model": "dev_loss"}, "--metric_for_best_model needs --dev_file"),
        ({"learning_rate": 1e30, "num_training_steps": 9}, "the loss is"),
    ],
)
def test_wrong_flags_are_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], message: str
) -> None:
    assert message in error_of(capsys, arguments(world, tmp_path / "out", **flags))
    assert not list((tmp_path / "out").glob("ckpt-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"w1\n\xff", "train.txt:2: not UTF-8"), (b"x y", "none of the 2 tokens")],
)
def test_a_wrong_corpus_is_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "train.txt").write_bytes(content)
    out = tmp_path / "out"
    assert message in error_of(capsys, arguments(world, out, train_file=tmp_path / "train.txt"))
    assert [file.name for file in out.iterdir()] == [".lock"]


def test_models_that_cannot_be_paired(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"student_layers": None, "student_hidden_size": None}
    other = copy_teacher(tmp_path / "other", "student", WORDS[::-1])
    assert "its vocabulary is not the teacher's" in error_of(
        capsys, arguments(world, tmp_path / "out", **sizes, student=other)
    )
    config = json.loads((GOLDENS / "student" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 80}))
    assert "vocab_size 80, the teacher has 97 words" in error_of(
        capsys, arguments(world, tmp_path / "out", **sizes, student_config=tmp_path / "config.json")
    )
    bare = tmp_path / "bare"
    copy_teacher(bare)
    (bare / "vocab.txt").unlink()
    assert "holds no vocabulary" in error_of(capsys, arguments(world, tmp_path / "out", teacher=bare))
    (bare / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS[:40]]) + "\n")
    assert "another model's vocabulary" in error_of(capsys, arguments(world, tmp_path / "out", teacher=bare))


def test_another_run_is_not_overwritten(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {"num_training_steps": 1, "save_steps": 1}
    assert main(arguments(world, tmp_path, **args)) == 0
    capsys.readouterr()
    assert "relations" in error_of(capsys, arguments(world, tmp_path, **args, relations="vv"))
    state = load_file(tmp_path / "ckpt-1" / "model.safetensors")
    state.pop("bert.embeddings.LayerNorm.weight")
    save_file(state, tmp_path / "ckpt-1" / "model.safetensors")
    assert "bert.embeddings.LayerNorm.weight" in error_of(capsys, arguments(world, tmp_path, **args))


def test_lowest_loss_of_a_relation_is_the_best(world: Path, tmp_path: Path) -> None:
    flags = {"metric_for_best_model": "dev_kk", "dev_file": world / "dev.txt", "num_training_steps": 4, "save_steps": 1}
    assert main(arguments(world, tmp_path, **flags)) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    found = {record["dev_kk"]: record["step"] for record in history["records"]}
    assert len(found) == 4 and history["best"]["step"] == found[min(found)] != found[max(found)]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minilm_fast.distill import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--relation_heads" in done.stdout

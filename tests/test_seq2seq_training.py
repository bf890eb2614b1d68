"""Network, loss and training loop against the original's numbers."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_files import GOLDENS, NO_DROPOUT, RUN, arguments, copy_model, golden, write_examples

from minilm_fast import backend, checkpoint
from minilm_fast.data.masking import Feature
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.ops._dispatch import EXTENSION_ERROR
from minilm_fast.run_seq2seq import build_parser, main, make_trainer
from minilm_fast.training import checkpointing
from minilm_fast.training.loop import Trainer
from minilm_fast.training.optimizer import AdamW, linear_schedule, parameter_groups
from minilm_fast.training.reporting import StepReport
from minilm_fast.training.seq2seq import Seq2SeqTask


def _model(case: dict) -> Seq2SeqModel:
    loaded = checkpoint.load(GOLDENS / case["model"], for_training=True)
    changes: dict = {"label_smoothing": case["label_smoothing"]}
    if case["variant"] == "type45":
        changes |= {"source_type_id": 4, "target_type_id": 5}
    elif case["variant"] == "type0":
        changes |= {"type_vocab_size": 0}
    elif case["variant"] == "base_fix_word_embedding":
        changes |= {"fix_word_embedding": True}
    return Seq2SeqModel.from_state(loaded.config.replace(**changes), loaded.state).eval()


def test_adamw_against_its_formula() -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(5), torch.randn(3, 5)
    param = torch.nn.Parameter(weight.clone())
    optimizer = AdamW([param], lr=0.1, eps=1e-3, weight_decay=0.2)
    mean, square, expected = torch.zeros(5), torch.zeros(5), weight.clone()
    for t, gradient in enumerate(gradients, 1):
        param.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        size = 0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        expected = expected - size * mean / (square.sqrt() + 1e-3)
        expected = expected - 0.1 * 0.2 * expected
        torch.testing.assert_close(param.detach(), expected)


def test_what_decays() -> None:
    model = _model({"model": "tiny_relpos", "label_smoothing": 0.1, "variant": "relpos"})
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    assert not [names[id(p)] for p in decayed["params"] if "bias" in names[id(p)] or "Norm" in names[id(p)]]
    assert "bert.rel_pos_bias.weight" in {names[id(p)] for p in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_linear_schedule() -> None:
    assert [linear_schedule(step, 2, 6) for step in range(7)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert linear_schedule(0, 0, 4) == 1


@pytest.mark.parametrize("case", golden("trajectories.json"), ids=lambda c: c["name"])
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_whole_runs_follow_the_original(case: dict, backend_name: str, tmp_path: Path) -> None:
    if backend_name == "cpu" and EXTENSION_ERROR is not None:
        pytest.skip(EXTENSION_ERROR)
    with backend(backend_name):
        follow(case, tmp_path)


def follow(case: dict, tmp_path: Path) -> None:
    """Trains as the original did and compares each step; on a GPU where there is one."""
    model = copy_model(tmp_path / "model", case["model"], **NO_DROPOUT)
    flags = {name: value for name, value in case["cli_args"].items() if name != "model_type"}
    args = build_parser().parse_args(arguments(tmp_path, model, **flags))
    trainer = make_trainer(args)
    # The original trains on examples without a target, which the command line refuses.
    trainer = _with_features(args, trainer)
    losses, norms, rates = [], [], []
    trainer.task.module.train()
    while trainer.step < trainer.options.total_steps:
        report = trainer.train_step()
        rates.append(report.learning_rate)
        losses += report.losses
        norms.append(report.grad_norm)
    assert losses == pytest.approx(case["loss"], rel=1e-3)
    assert norms == pytest.approx(case["grad_norm_before_clip"], rel=1e-3)
    assert rates == pytest.approx(case["lr_used"], rel=1e-6, abs=1e-12)


def _with_features(args: argparse.Namespace, trainer: Trainer) -> Trainer:
    features = [Feature(**feature) for feature in golden("dataset.json")["features"]]
    old = trainer.task
    task = Seq2SeqTask(old.module, old.tokenizer, old.special, features, [], old.options, trainer.world)
    return Trainer(task, trainer.options, args.output_dir, trainer.world)


@pytest.mark.parametrize(
    "extra",
    [{}, {"group_by_length": True, "bf16": True}, {"max_tokens": 120}],
    ids=["plain", "grouped-bf16", "max-tokens"],
)
def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, extra: dict) -> None:
    model = copy_model(tmp_path / "model")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(tmp_path, model, **RUN, **extra, output_dir=whole)) == 0
    assert main(arguments(tmp_path, model, **RUN, **extra, output_dir=broken)) == 0
    shutil.rmtree(broken / "ckpt-6")
    assert checkpointing.latest_step(broken) == 3
    assert main(arguments(tmp_path, model, **RUN, **extra, output_dir=broken)) == 0
    first, second = (checkpoint.load(folder / "ckpt-6").state for folder in (whole, broken))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (whole / "history.json").read_bytes() == (broken / "history.json").read_bytes()


def test_batches_of_a_number_of_tokens(tmp_path: Path) -> None:
    """Over an epoch the losses of the steps are the loss of every label, each weighing the same."""
    model = copy_model(tmp_path / "model", **NO_DROPOUT)
    flags = RUN | {"max_tokens": 90, "num_training_steps": -1, "num_training_epochs": 1, "mask_way": "v2"}
    flags |= {"target_mask_prob": -1, "random_prob": 0, "keep_prob": 0, "learning_rate": 1e-12}
    trainer = make_trainer(build_parser().parse_args(arguments(tmp_path, model, **flags)))
    trainer.task.module.train()
    batches, size = trainer.task.batches, trainer.options.total_steps
    features = list(batches.features)
    assert size > 3
    chosen = [feature for step in range(size) for feature in batches[step][0]]
    assert sorted(map(str, chosen)) == sorted(map(str, features))
    tokens = [trainer.task.step_data(step).tokens for step in range(size)]
    assert max(tokens) <= 90 and sum(tokens) / size > 60
    mean = sum(trainer.train_step().parts["loss"] for _ in range(size)) / size
    trainer.task.dev_features = features
    assert mean == pytest.approx(_dev_loss(trainer), rel=1e-5)


def test_training_lowers_the_dev_loss_and_saves_what_loads_back(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model", **NO_DROPOUT)
    dev = write_examples(tmp_path / "dev.jsonl")
    flags = RUN | {"num_training_steps": 40, "save_steps": 20, "dev_file": dev, "learning_rate": 3e-3}
    args = arguments(tmp_path, model, **flags)
    before = _dev_loss(make_trainer(build_parser().parse_args(args)))
    assert main(args) == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("ckpt-*")) == ["ckpt-20", "ckpt-40"]
    assert sorted(p.name for p in out.glob("optim.*")) == ["optim.20.bin", "optim.40.bin"]
    history = json.loads((out / "history.json").read_text())
    assert [record["step"] for record in history["records"]] == [20, 40]
    last = history["records"][-1]
    assert last["dev_loss"] < before - 0.2
    assert history["best"] == {"step": 40, "metric": "dev_loss", "value": last["dev_loss"]}
    assert (out / "best").resolve() == out / "ckpt-40"
    loaded = checkpoint.load(out / "ckpt-40", for_training=True)
    assert not loaded.missing and not loaded.unexpected
    again = make_trainer(build_parser().parse_args(args))
    with checkpointing.run_folder(again.world, out) as folder:
        again.prepare(folder)
    assert again.step == 40
    assert _dev_loss(again) == pytest.approx(last["dev_loss"], rel=1e-6)


def test_what_is_cut_or_unknown_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = copy_model(tmp_path / "model")
    words = (GOLDENS / "tiny" / "vocab.txt").read_text(encoding="utf-8").split()[10:16]
    lines = [{"src": words[:2], "tgt": words[:1]}, {"src": words * 3, "tgt": [*words, "nowhere"]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"num_training_steps": 1, "max_source_seq_length": 10, "max_target_seq_length": 5}
    with caplog.at_level("INFO"):
        make_trainer(build_parser().parse_args(arguments(tmp_path, model, **flags)))
    assert "1 sources and 1 targets are over their limits and cut; 1 of 28 tokens are unknown" in caplog.text


def _dev_loss(trainer: Trainer) -> float:
    return trainer.task.dev_loss(trainer.precision)


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ({}, '{"src": "a", "tgt": ', "train.jsonl:1: broken JSON"),
        ({}, '{"src": "a"}', "train.jsonl:1: no 'tgt'"),
        ({}, '{"src": "a", "tgt": ""}', "train.jsonl:1: 'tgt' is empty"),
        ({}, "", "holds no examples"),
        ({"max_source_seq_length": 2}, '{"src": "a", "tgt": "b"}', "--max_source_seq_length"),
        ({"label_smoothing": 1.5}, '{"src": "a", "tgt": "b"}', "--label_smoothing"),
        ({"dev_file": "missing.jsonl"}, '{"src": "a", "tgt": "b"}', "cannot read missing.jsonl"),
        ({"learning_rate": 1e30, "num_training_steps": 9}, '{"src": "a", "tgt": "b"}', "the loss is"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict, content: str, message: str
) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    model = copy_model(tmp_path / "model")
    assert main(arguments(tmp_path, model, **({"num_training_steps": 1} | flags))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not list((tmp_path / "out").glob("ckpt-*"))


def test_broken_training_state_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_model(tmp_path / "model")
    args = arguments(tmp_path, model, **(RUN | {"num_training_steps": 3}))
    assert main(args) == 0
    state = tmp_path / "out" / "optim.3.bin"
    state.write_bytes(state.read_bytes()[:1000])
    assert main(args) == 2
    assert f"error: cannot resume from {state}" in capsys.readouterr().err


def test_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    model = copy_model(tmp_path / "model")
    assert main(arguments(tmp_path, model, output_dir=tmp_path / "file" / "out")) == 2
    assert "--output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--learning_rate=nan", "--learning_rate=-1", "--per_gpu_train_batch_size=0"])
def test_flag_out_of_range(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--train_file=a", "--model_type=bert", "--model_name_or_path=b", "--output_dir=c"]
    with pytest.raises(SystemExit):
        main([*required, flag])
    assert "must be" in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minilm_fast.run_seq2seq import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--train_file" in done.stdout
    assert time.perf_counter() - start < 5


def test_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def interrupted(trainer: Trainer, received: Callable[[], int]) -> StepReport:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return step(trainer, received)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    model = copy_model(tmp_path / "model")
    assert main(arguments(tmp_path, model, **RUN)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; the same command goes on after step 3"

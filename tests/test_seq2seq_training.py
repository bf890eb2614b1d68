"""Network, loss and training loop against the original's numbers."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.batching import Seq2SeqBatch, collate
from minilm_fast.data.masking import Feature, Sample
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import relative_position_bucket, segment_mask
from minilm_fast.modeling.seq2seq import Seq2SeqModel, label_smoothed_cross_entropy
from minilm_fast.ops.layout import SequenceLayout
from minilm_fast.run_seq2seq import build_parser, main, make_trainer
from minilm_fast.training import checkpointing
from minilm_fast.training.loop import Trainer
from minilm_fast.training.optimizer import AdamW, linear_schedule, parameter_groups

GOLDENS = Path(__file__).parent / "goldens"


def _golden(name: str) -> Any:
    return json.loads((GOLDENS / "train" / name).read_text())


def _golden_batch() -> Seq2SeqBatch:
    inputs = _golden("inputs.json")["inputs"]["v2"]
    samples = []
    for i, (source, target) in enumerate(zip(inputs["num_source_tokens"], inputs["num_target_tokens"], strict=True)):
        queries, pseudo, labels = (inputs[name][i][:target] for name in ("target_ids", "pseudo_ids", "label_ids"))
        samples.append(Sample(inputs["source_ids"][i][:source], queries, pseudo, list(range(target)), labels))
    return collate(samples, pad_id=0)


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


LOSS_CASES = _golden("loss_and_grads.json")


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda c: f"{c['variant']}-{c['label_smoothing']}")
def test_loss_and_gradients_equal_the_original(case: dict) -> None:
    model = _model(case)
    loss = model(*_golden_batch().tensors())
    assert loss.item() == pytest.approx(float(case["loss_repr"]), rel=1e-5)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert grads.keys() == {expected["name"] for expected in case["grads"]}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert norm == pytest.approx(case["total_grad_norm"], rel=1e-4)
    for expected in case["grads"]:
        grad = grads[expected["name"]]
        tolerance = 1e-4 * expected["l2"] + 1e-6
        assert list(grad.shape) == expected["shape"]
        assert grad.norm().item() == pytest.approx(expected["l2"], abs=tolerance)
        assert grad.sum().item() == pytest.approx(expected["sum"], abs=10 * tolerance)
        torch.testing.assert_close(grad.flatten()[:8], torch.tensor(expected["first8"]), rtol=0, atol=tolerance)


def test_loss_under_bf16_autocast_is_close() -> None:
    case = LOSS_CASES[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _model(case)(*_golden_batch().tensors())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(case["loss_repr"]), rel=2e-2)


def test_rows_beside_the_predicted_ones_do_not_change_them() -> None:
    model = _model(LOSS_CASES[0])
    batch = _golden_batch()
    everything = model.bert(batch.input_ids, batch.position_ids, batch.segments)
    rows = model.bert(batch.input_ids, batch.position_ids, batch.segments, batch.predicted)
    index = batch.predicted[:, :, None].expand(-1, -1, everything.shape[2])
    torch.testing.assert_close(rows, everything.gather(1, index), rtol=1e-5, atol=1e-5)


def test_segment_mask_equals_the_original() -> None:
    golden = _golden("attention_mask_v2.json")
    counts = list(zip(golden["num_source_tokens"], golden["num_target_tokens"], strict=True))
    segments = torch.tensor([[s, t, t] for s, t in counts])
    mask = segment_mask(segments, int(segments.sum(1).max()))
    for found, expected, (source, target) in zip(mask, golden["v2_mask"], counts, strict=True):
        # The original pads each part, we pad the end.
        target_at = golden["source_len"]
        pseudo_at = target_at + golden["target_len"]
        where = [*range(source), *range(target_at, target_at + target), *range(pseudo_at, pseudo_at + target)]
        original = torch.tensor([[int(c) for c in row] for row in expected.split("|")], dtype=torch.bool)
        assert torch.equal(found[: len(where), : len(where)], original[where][:, where])


@pytest.mark.parametrize("counts", [(3, 0, 0), (0, 4, 0), (3, 4, 0), (3, 4, 4), (1, 1, 1)])
def test_segment_mask_agrees_with_the_operators_rules(counts: tuple[int, int, int]) -> None:
    other = (2, 3, 3)
    layout = SequenceLayout.from_counts(*zip(counts, other, strict=True))
    mask = segment_mask(torch.tensor([counts, other]), layout.max_seqlen)
    rules = layout.dense_mask()
    for i, length in enumerate((sum(counts), sum(other))):
        assert torch.equal(mask[i, :length, :length], rules[i, :length, :length])
        assert not mask[i, :length, length:].any()
        assert mask[i].any(dim=1).all()


@pytest.mark.parametrize("case", _golden("relative_position_buckets.json"), ids=lambda c: str(c["num_buckets"]))
def test_relative_position_buckets(case: dict) -> None:
    start = case["relative_position_from"]
    distance = torch.arange(start, start + len(case["buckets"]))
    found = relative_position_bucket(distance, case["num_buckets"], case["max_distance"])
    assert found.tolist() == case["buckets"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_label_smoothed_cross_entropy(smoothing: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, vocab = 37, 23
    logits = (3 * torch.randn(rows, vocab)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    labels[:2] = 0
    weights = torch.rand(rows)
    losses = label_smoothed_cross_entropy(logits, labels, smoothing)
    (losses * weights).sum().backward()
    exact = logits.detach().double().requires_grad_()
    if smoothing:
        target = torch.full((rows, vocab), smoothing / (vocab - 2), dtype=torch.float64)
        target[:, 0] = 0
        target[torch.arange(rows), labels] = 1 - smoothing
        target[labels == 0] = 0
        expected = F.kl_div(exact.log_softmax(1), target, reduction="none").sum(1)
    else:
        expected = F.cross_entropy(exact, labels, reduction="none")
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert logits.grad is not None and logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * 1e-1)


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


def _tokenized_inputs(path: Path) -> Path:
    """The tiny model's inputs as token ids' own words, so that nothing depends on a text tokenizer."""
    features = _golden("dataset.json")["features"]
    vocabulary = (GOLDENS / "tiny" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    with open(path, "w", encoding="utf-8") as file:
        for feature in features:
            words = {key: [vocabulary[i] for i in feature[f"{key}_ids"]] for key in ("source", "target")}
            if words["target"]:
                file.write(json.dumps({"src": words["source"], "tgt": words["target"]}) + "\n")
    return path


def _copy_model(folder: Path, name: str = "tiny", **changes: object) -> Path:
    folder.mkdir(parents=True)
    source = GOLDENS / name
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("model.safetensors", "vocab.txt"):
        shutil.copy(source / file, folder / file)
    return folder


def _arguments(tmp_path: Path, model: Path, **flags: object) -> list[str]:
    flags = {
        "train_file": tmp_path / "train.jsonl",
        "model_type": "bert",
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "do_lower_case": True,
    } | flags
    if not (tmp_path / "train.jsonl").exists():
        _tokenized_inputs(tmp_path / "train.jsonl")
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("case", _golden("trajectories.json"), ids=lambda c: c["name"])
def test_whole_runs_follow_the_original(case: dict, tmp_path: Path) -> None:
    model = _copy_model(tmp_path / "model", case["model"], **NO_DROPOUT)
    flags = {name: value for name, value in case["cli_args"].items() if name != "model_type"}
    args = build_parser().parse_args(_arguments(tmp_path, model, **flags))
    trainer = make_trainer(args)
    # The original trains on examples without a target, which the command line refuses.
    trainer = _with_features(args, trainer)
    losses, norms, rates = [], [], []
    trainer.model.train()
    while trainer.step < trainer.total_steps:
        rates.append(trainer.learning_rate)
        step_losses, norm, _ = trainer.train_step()
        losses += step_losses
        norms.append(norm)
    assert losses == pytest.approx(case["loss"], rel=1e-3)
    assert norms == pytest.approx(case["grad_norm_before_clip"], rel=1e-3)
    assert rates == pytest.approx(case["lr_used"], rel=1e-6, abs=1e-12)


def _with_features(args: argparse.Namespace, trainer: Trainer) -> Trainer:
    features = [Feature(**feature) for feature in _golden("dataset.json")["features"]]
    return Trainer(trainer.model, trainer.tokenizer, trainer.special, features, [], trainer.options, args.output_dir)


RUN = {
    "num_training_steps": 6,
    "per_gpu_train_batch_size": 4,
    "max_source_seq_length": 24,
    "max_target_seq_length": 10,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 3,
}


@pytest.mark.parametrize("extra", [{}, {"group_by_length": True, "bf16": True}], ids=["plain", "grouped-bf16"])
def test_resumed_run_ends_with_the_same_weights(tmp_path: Path, extra: dict) -> None:
    model = _copy_model(tmp_path / "model")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(_arguments(tmp_path, model, **RUN, **extra, output_dir=whole)) == 0
    assert main(_arguments(tmp_path, model, **(RUN | {"num_training_steps": 6}), **extra, output_dir=broken)) == 0
    shutil.rmtree(broken / "ckpt-6")
    (broken / "optim.6.bin").unlink()
    assert checkpointing.latest_step(broken) is None
    _run_three_steps(tmp_path, model, extra, broken)
    assert checkpointing.latest_step(broken) == 3
    assert main(_arguments(tmp_path, model, **RUN, **extra, output_dir=broken)) == 0
    first, second = (checkpoint.load(folder / "ckpt-6").state for folder in (whole, broken))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def _run_three_steps(tmp_path: Path, model: Path, extra: dict, output_dir: Path) -> None:
    shutil.rmtree(output_dir)
    output_dir.mkdir()
    trainer = make_trainer(
        build_parser().parse_args(_arguments(tmp_path, model, **RUN, **extra, output_dir=output_dir))
    )
    trainer.model.train()
    for _ in range(3):
        trainer.train_step()
    trainer.save()


def test_training_lowers_the_dev_loss_and_saves_what_loads_back(tmp_path: Path) -> None:
    model = _copy_model(tmp_path / "model", **NO_DROPOUT)
    dev = _tokenized_inputs(tmp_path / "dev.jsonl")
    flags = RUN | {"num_training_steps": 40, "save_steps": 20, "dev_file": dev, "learning_rate": 3e-3}
    args = _arguments(tmp_path, model, **flags)
    before = make_trainer(build_parser().parse_args(args)).dev_loss()
    assert main(args) == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("ckpt-*")) == ["ckpt-20", "ckpt-40"]
    assert [p.name for p in out.glob("optim.*")] == ["optim.40.bin"]
    history = json.loads((out / "history.json").read_text())
    assert [record["step"] for record in history] == [20, 40]
    assert history[-1]["dev_loss"] < before - 0.2
    loaded = checkpoint.load(out / "ckpt-40", for_training=True)
    assert not loaded.missing and not loaded.unexpected
    again = make_trainer(build_parser().parse_args(args))
    assert again.dev_loss() == pytest.approx(history[-1]["dev_loss"], rel=1e-6)


def test_encoder_without_a_head_gets_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = checkpoint.load(GOLDENS / "tiny", for_training=True).state
    config = Config.from_file(GOLDENS / "tiny")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("bert.")}
    model = Seq2SeqModel.from_state(config, encoder)
    assert "cls.predictions.transform.dense.weight" in caplog.text
    assert torch.isfinite(model(*_golden_batch().tensors()))
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is bert\.embeddings\.LayerNorm\.bias"):
        Seq2SeqModel.from_state(config, {k: v for k, v in encoder.items() if k != "bert.embeddings.LayerNorm.bias"})
    with pytest.raises(UserError, match="has shape"):
        Seq2SeqModel.from_state(config.replace(intermediate_size=100), state)


def test_untied_decoder_is_trained_on_its_own() -> None:
    loaded = checkpoint.load(GOLDENS / "tiny", for_training=True)
    state = dict(loaded.state)
    state["cls.predictions.decoder.weight"] = torch.randn_like(state["bert.embeddings.word_embeddings.weight"])
    model = Seq2SeqModel.from_state(loaded.config.replace(tie_word_embeddings=False), state)
    model(*_golden_batch().tensors()).backward()
    saved = model.checkpoint_state()
    assert torch.equal(saved["cls.predictions.decoder.weight"], state["cls.predictions.decoder.weight"])
    assert model.cls.predictions.decoder.weight.grad.norm() > 0


def test_padding_row_learns_through_the_decoder_only() -> None:
    model = _model(LOSS_CASES[0])
    embeddings = model.bert.embeddings.word_embeddings
    embeddings(torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert embeddings.weight.grad.abs().sum() == 0


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
    model = _copy_model(tmp_path / "model")
    assert main(_arguments(tmp_path, model, **({"num_training_steps": 1} | flags))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not list((tmp_path / "out").glob("ckpt-*"))


def test_broken_training_state_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _copy_model(tmp_path / "model")
    args = _arguments(tmp_path, model, **(RUN | {"num_training_steps": 3}))
    assert main(args) == 0
    state = tmp_path / "out" / "optim.3.bin"
    state.write_bytes(state.read_bytes()[:1000])
    assert main(args) == 2
    assert f"error: cannot resume from {state}" in capsys.readouterr().err


def test_output_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    model = _copy_model(tmp_path / "model")
    assert main(_arguments(tmp_path, model, output_dir=tmp_path / "file" / "out")) == 2
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

    def interrupted(trainer: Trainer) -> tuple[list[float], float, int]:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    model = _copy_model(tmp_path / "model")
    assert main(_arguments(tmp_path, model, **RUN)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; the same command goes on after step 3"

"""The training loop: resume after any kind of end, signals, other runs' folders, what is not finite, reports."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import NO_DROPOUT, RUN, arguments, copy_model, write_examples

from minilm_fast import backend, checkpoint
from minilm_fast.errors import UserError
from minilm_fast.run_seq2seq import build_parser, main, make_trainer
from minilm_fast.training import checkpointing, loop
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import queried_pairs, seen_pairs, sequence_to_sequence_flops
from minilm_fast.training.loop import Trainer
from minilm_fast.training.reporting import Meter, StepReport
from minilm_fast.training.seq2seq import Seq2SeqTask

DRIVER = Path(__file__).with_name("forked_runs.py")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder, for_training=True).state


def _assert_equal(first: Path, second: Path) -> None:
    one, other = _weights(first), _weights(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The output folder of an undisturbed run; not to be changed."""
    assert main(arguments(place, place / "model", **RUN, output_dir=place / "finished")) == 0
    return place / "finished"


@pytest.fixture
def run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the program with flags; gives its status and what it printed."""

    def start(**flags: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(arguments(place, place / "model", **(RUN | {"output_dir": tmp_path / "out"} | flags)))
        return status, capsys.readouterr().err

    return start


def test_twenty_random_kills_do_not_change_the_end(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    dev = write_examples(tmp_path / "dev.jsonl")
    flags = RUN | {"num_training_steps": 10, "save_steps": 1, "save_total_limit": 3, "dev_file": dev}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments(tmp_path, model, **flags)))
    command = [sys.executable, str(DRIVER), str(tmp_path / "arguments.json"), "20", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == 20 and found["finished"] >= 1
    assert max(found["steps"]) > 1


def _copy_as_if_cut_short(finished: Path, out: Path) -> None:
    """A folder in which step 6 was just saved, and nothing else done."""
    shutil.copytree(finished, out, symlinks=True)
    (out / "history.json").unlink()


def test_damaged_state_falls_back_to_the_one_before(finished: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _copy_as_if_cut_short(finished, out)
    state = out / "optim.6.bin"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    status, err = run()
    assert status == 0
    assert f"warning: cannot resume from {state}: it is damaged" in err
    assert "resuming after step 3" in err
    _assert_equal(finished / "ckpt-6", out / "ckpt-6")


def test_weights_that_were_cut_off_fall_back_too(finished: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _copy_as_if_cut_short(finished, out)
    weights = out / "ckpt-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    status, err = run()
    assert status == 0 and "warning: " in err and "resuming after step 3" in err
    _assert_equal(finished / "ckpt-6", out / "ckpt-6")


def test_what_is_saved_after_falling_back_is_kept(finished: Path, run: Any, tmp_path: Path) -> None:
    """Damaged checkpoints of later steps do not count among the last ones."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    for step in (7, 8):
        shutil.copytree(out / "ckpt-6", out / f"ckpt-{step}")
    for step in (6, 7, 8):
        (out / f"optim.{step}.bin").write_bytes(b"damaged")
    with checkpointing.run_folder(World({}), out) as folder:
        words = arguments(finished.parent, finished.parent / "model", **(RUN | {"output_dir": out}))
        trainer = make_trainer(build_parser().parse_args(words))
        trainer.prepare(folder)
        assert trainer.step == 3
        trainer.task.module.train()
        trainer.train_step()
        trainer.save()
        checkpointing.prune(out, 4, limit=1, best=None)
    assert checkpointing.whole_steps(out) == [4]
    assert sorted(path.name for path in out.glob("optim.*")) == ["optim.4.bin"]
    assert run()[0] == 0
    _assert_equal(finished / "ckpt-6", out / "ckpt-6")


def test_no_whole_checkpoint_is_an_error(finished: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _copy_as_if_cut_short(finished, out)
    for step in (3, 6):
        path = out / f"optim.{step}.bin"
        path.write_bytes(path.read_bytes()[:1000])
    status, err = run()
    assert status == 2 and f"error: cannot resume from {out / 'optim.6.bin'}" in err
    for step in (3, 6):
        (out / f"optim.{step}.bin").unlink()
    status, err = run()
    assert status == 2 and "cannot be resumed" in err
    assert (out / "ckpt-6" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"seed": 43}, "--seed 42 there, 43 here"),
        ({"num_training_steps": 7}, "--num_training_steps 6 there, 7 here"),
        ({"per_gpu_train_batch_size": 2}, "--per_gpu_train_batch_size 4 there, 2 here"),
        ({"bf16": True}, "--bf16 False there, True here"),
        ({"keep_prob": 0.2}, "--keep_prob 0.1 there, 0.2 here"),
        ({"model_name_or_path": "OTHER"}, "--model_name_or_path"),
        ({"train_file": "OTHER"}, "--train_file sha256 "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_with_another_runs_checkpoints(
    finished: Path, run: Any, place: Path, tmp_path: Path, flags: dict, named: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    if "model_name_or_path" in flags:
        flags = {"model_name_or_path": copy_model(tmp_path / "other")}
    if "train_file" in flags:
        lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[1:]))
        flags = {"train_file": tmp_path / "other.jsonl"}
    status, err = run(**flags)
    assert status == 2
    assert f"holds checkpoints of another run ({named}" in err and "--overwrite_output_dir" in err
    assert (out / "optim.6.bin").read_bytes() == (finished / "optim.6.bin").read_bytes()


def test_another_runs_checkpoints_can_be_overwritten(finished: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    status, err = run(num_training_steps=4, overwrite_output_dir=True)
    assert status == 0 and "resuming" not in err
    assert checkpointing.weight_steps(out) == [3, 4]
    assert [record["step"] for record in json.loads((out / "history.json").read_text())["records"]] == [3, 4]
    status, err = run(num_training_steps=4, overwrite_output_dir=True)
    assert status == 0 and "resuming after step 4" in err


def test_a_folder_of_another_program(finished: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    (out / "run.json").unlink()
    status, err = run()
    assert status == 2 and "of another program" in err


def test_two_runs_in_one_folder(run: Any, tmp_path: Path) -> None:
    held = checkpointing.RunFolder(tmp_path / "out")
    status, err = run()
    assert status == 2 and "another run is writing to it" in err
    held.close()
    assert run(num_training_steps=1)[0] == 0


class _Sending:
    """Sends this process a signal during a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
        whole = Seq2SeqTask.step_data

        def step_data(task: Seq2SeqTask, current: int) -> Any:
            if current == step - 1:
                os.kill(os.getpid(), number)
            return whole(task, current)

        monkeypatch.setattr(Seq2SeqTask, "step_data", step_data)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(
    number: int, expected: int, finished: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        _Sending(patch, number, 5)
        status, err = run()
    assert status == expected
    assert err.splitlines()[-1].endswith("; the same command goes on after step 5")
    assert checkpointing.latest_step(tmp_path / "out") == 5
    assert signal.getsignal(number) == before
    assert run()[0] == 0
    _assert_equal(finished / "ckpt-6", tmp_path / "out" / "ckpt-6")
    whole, broken = (json.loads((f / "history.json").read_text()) for f in (finished, tmp_path / "out"))
    assert whole == broken


def test_full_disk_while_saving(finished: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write = checkpointing.write_archive
    saved = []

    def full(state: Any, file: Any) -> None:
        if saved:
            file.write(b"as far as it goes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(state["step"])
        write(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "write_archive", full)
        status, err = run()
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {out / 'optim.6.bin'}: cannot be written: No space left")
    assert checkpointing.whole_steps(out) == [3] and not list(out.glob(".*.tmp"))
    assert run()[0] == 0
    _assert_equal(finished / "ckpt-6", out / "ckpt-6")


# Runs in which files cannot grow from some point on; each in a child, as the limit cannot be lifted.
LIMITED_RUNS = """
import json, os, resource, signal, sys
import forked_runs
from minilm_fast.training.checkpointing import RunFolder
from minilm_fast.training.seq2seq import Seq2SeqTask
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limit(owner, method, log):
    whole = getattr(owner, method)
    def limited(*given, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        return whole(*given, **more)
    setattr(owner, method, limited)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)

for name, command in json.loads(sys.argv[1]).items():
    place = (RunFolder, "claim") if name == "state" else (Seq2SeqTask, "save_weights")
    print(name, forked_runs.wait(forked_runs.fork(command, lambda: limit(*place, name + ".log"))))
"""


def test_files_that_cannot_grow(place: Path, tmp_path: Path) -> None:
    """The real error of a write, through the writers of PyTorch and safetensors."""
    formats = {"state": "both", "safetensors": "safetensors", "bin": "bin"}
    commands = {
        name: arguments(place, place / "model", **RUN, output_dir=tmp_path / name, save_format=save_format)
        for name, save_format in formats.items()
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(DRIVER.parent), *sys.path])}
    script = [sys.executable, "-c", LIMITED_RUNS, json.dumps(commands)]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:3] == ["state 2", "safetensors 2", "bin 2"], done.stderr
    for name in formats:
        out, log = tmp_path / name, (tmp_path / f"{name}.log").read_text()
        assert log.splitlines()[-1].startswith(f"error: {out}"), log
        assert "File too large" in log and "Traceback" not in log
        assert not list(out.glob(".*.tmp")) and checkpointing.latest_step(out) is None


def _trainer(place: Path, out: Path, **flags: object) -> Trainer:
    words = arguments(place, place / "model", **(RUN | {"output_dir": out} | flags))
    trainer = make_trainer(build_parser().parse_args(words))
    trainer.task.module.train()
    return trainer


def _poison(trainer: Trainer, steps: set[int]) -> None:
    """Gradients of these steps (from 1) become NaN."""
    parameter = next(trainer.task.module.parameters())

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if trainer.step + 1 in steps else gradient

    parameter.register_hook(hook)


def test_gradients_that_are_not_finite_stop_the_run(place: Path, tmp_path: Path) -> None:
    trainer = _trainer(place, tmp_path / "out")
    _poison(trainer, {2})
    trainer.train_step()
    before = {name: tensor.clone() for name, tensor in trainer.task.module.state_dict().items()}
    with pytest.raises(UserError, match=r"step 2: the norm of the gradients is nan; try a lower --learning_rate"):
        trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.task.module.state_dict().items())


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(run: Any, tmp_path: Path) -> None:
    status, err = run(learning_rate=1e30, save_steps=1, num_training_steps=9)
    assert status == 2
    assert "the loss is" in err.splitlines()[-1] and "try a lower --learning_rate" in err
    saved = checkpointing.latest_step(tmp_path / "out")
    assert saved is not None and f"error: step {saved + 1}: " in err


@pytest.fixture
def reference() -> Iterator[None]:
    """The operators in plain PyTorch, which know fp16 on a CPU too."""
    with backend("reference"):
        yield


def test_fp16_on_a_cpu(run: Any) -> None:
    status, err = run(fp16=True)
    assert status == 2 and err.splitlines()[-1] == "error: --fp16 needs a GPU; on a CPU use --bf16"


@pytest.mark.usefixtures("reference")
def test_fp16_skips_and_counts_steps(place: Path, tmp_path: Path) -> None:
    trainer = _trainer(place, tmp_path / "out", fp16=True)
    _poison(trainer, {2, 3})
    scale = trainer.precision.scaler.get_scale()
    reports = [trainer.train_step() for _ in range(4)]
    assert [report.skipped for report in reports] == [False, True, True, False]
    assert trainer.skipped == 2 and trainer.step == 4
    assert trainer.precision.scaler.get_scale() == scale / 4
    assert all(torch.isfinite(tensor).all() for tensor in trainer.task.module.state_dict().values())


@pytest.mark.usefixtures("reference")
def test_fp16_gives_up_when_nothing_helps(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MOST_SKIPPED_IN_A_ROW", 3)
    trainer = _trainer(place, tmp_path / "out", fp16=True)
    _poison(trainer, set(range(10)))
    for _ in range(3):
        assert trainer.train_step().skipped
    with pytest.raises(UserError, match=r"step 4: the norm of the gradients is nan as in the 3 steps before; .*--bf16"):
        trainer.train_step()


@pytest.mark.usefixtures("reference")
def test_fp16_resumes_with_its_scale(run: Any, place: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(fp16=True, output_dir=whole)[0] == 0
    shutil.copytree(whole, tmp_path / "out", symlinks=True)
    shutil.rmtree(tmp_path / "out" / "ckpt-6")
    assert run(fp16=True)[0] == 0
    _assert_equal(whole / "ckpt-6", tmp_path / "out" / "ckpt-6")


@pytest.mark.parametrize("flags", [{"fp16": True, "bf16": True}, {"dev_task": "qg"}], ids=["precision", "dev"])
def test_flags_that_do_not_go_together(flags: dict, run: Any) -> None:
    status, err = run(**flags)
    assert status == 2 and err.splitlines()[-1].startswith("error: --")


def test_accumulation_equals_a_large_batch_with_equal_token_weights(place: Path, tmp_path: Path) -> None:
    copy_model(tmp_path / "model", **NO_DROPOUT)
    common = {"model_name_or_path": tmp_path / "model", "average_tokens_across_batches": True, "learning_rate": 1e-4}
    large = _trainer(place, tmp_path / "a", **common, per_gpu_train_batch_size=8)
    small = _trainer(place, tmp_path / "b", **common, per_gpu_train_batch_size=2, gradient_accumulation_steps=4)
    for _ in range(4):
        one, other = large.train_step(), small.train_step()
        assert one.parts["loss"] == pytest.approx(other.parts["loss"], rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.tokens == other.tokens and one.flops == pytest.approx(other.flops)
    other = small.task.module.state_dict()
    for name, tensor in large.task.module.state_dict().items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(place: Path, tmp_path: Path) -> None:
    plain = _trainer(place, tmp_path / "a")
    saving = _trainer(place, tmp_path / "b", gradient_checkpointing=True)
    for trainer in (plain, saving):
        torch.manual_seed(0)
        trainer.train_step()
        trainer.train_step()
    other = saving.task.module.state_dict()
    for name, tensor in plain.task.module.state_dict().items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["v0", "v1"])
def test_the_other_ways_of_masking(way: str, run: Any, place: Path, tmp_path: Path) -> None:
    """With the original's defaults, under which its v1 stops at an assertion."""
    flags = {"mask_way": way, "dev_file": place / "train.jsonl", "num_training_steps": 30, "save_steps": 10}
    assert run(**flags)[0] == 0
    records = json.loads((tmp_path / "out" / "history.json").read_text())["records"]
    assert records[-1]["dev_loss"] < records[0]["dev_loss"]


def test_features_are_cached_once(run: Any, tmp_path: Path, finished: Path) -> None:
    pytest.importorskip("datasets")
    cache = tmp_path / "features.arrow"
    status, err = run(cached_train_features_file=cache, num_training_steps=1, output_dir=tmp_path / "first")
    assert status == 0 and "tokenised" in err
    status, err = run(cached_train_features_file=cache)
    assert status == 0 and "tokenised" not in err
    _assert_equal(finished / "ckpt-6", tmp_path / "out" / "ckpt-6")
    assert not (tmp_path / "out" / "cached_features_for_training.arrow").exists()


def test_a_vocabulary_larger_than_the_models(run: Any, place: Path, tmp_path: Path) -> None:
    words = (place / "model" / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"word{i}" for i in range(500))]) + "\n")
    status, err = run(tokenizer_name=tmp_path / "vocab.txt")
    assert status == 2 and "this is another model's vocabulary" in err.splitlines()[-1]


def test_a_finished_run_is_left_alone(finished: Path, run: Any, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out", symlinks=True)
    before = (tmp_path / "out" / "ckpt-6").stat().st_ino
    status, err = run()
    assert status == 0 and "all 6 steps are done" in err
    assert (tmp_path / "out" / "ckpt-6").stat().st_ino == before


def test_epochs_are_counted(place: Path, tmp_path: Path) -> None:
    trainer = _trainer(place, tmp_path / "out", num_training_steps=-1, num_training_epochs=2)
    examples = len((place / "train.jsonl").read_text().splitlines())
    assert trainer.options.total_steps == -(-2 * examples // 4)


def test_best_checkpoint_is_kept(run: Any, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(Seq2SeqTask, "evaluate", lambda *_: {"dev_loss": next(losses)})
    assert run(save_steps=1, save_total_limit=1)[0] == 0
    out = tmp_path / "out"
    assert checkpointing.weight_steps(out) == [2, 6]
    assert json.loads((out / "history.json").read_text())["best"] == {"step": 2, "metric": "dev_loss", "value": 1.0}
    assert os.readlink(out / "best") == "ckpt-2"
    assert sorted(path.name for path in out.glob("optim.*")) == ["optim.6.bin"]


def test_killed_before_old_checkpoints_are_removed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that goes on removes them, also where all steps are done."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "prune", killed)
        assert run(save_steps=6, save_total_limit=1)[0] == 130
    shutil.copytree(tmp_path / "out" / "ckpt-6", tmp_path / "out" / "ckpt-3")
    assert run(save_steps=6, save_total_limit=1)[0] == 0
    assert checkpointing.weight_steps(tmp_path / "out") == [6]


def test_generation_scores_at_each_checkpoint(run: Any, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    dev = place / "train.jsonl"
    status, err = run(dev_file=dev, dev_task="qg", max_dev_generate=5, num_training_steps=3, dev_beam_size=2)
    assert status == 0, err
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    record = history["records"][0]
    assert {"dev_loss", "dev_bleu4", "dev_rougeL"} <= record.keys()
    assert 0 <= record["dev_bleu4"] <= 100 and history["best"]["metric"] == "dev_bleu4"
    status, err = run(dev_file=dev, dev_task="qg", metric_for_best_model="bleu", output_dir=tmp_path / "other")
    assert status == 2 and "--metric_for_best_model must be one of dev_bleu4, dev_loss, dev_rougeL" in err


def test_tensorboard(run: Any, place: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(dev_file=place / "train.jsonl", log_dir=tmp_path / "logs")[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "dev/loss"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("dev/loss")] == [3, 6]
    assert not (tmp_path / "out" / "runs").exists()


def test_progress_line(run: Any, place: Path) -> None:
    _, err = run()
    lines = [line.split(" ", 1)[1] for line in err.splitlines() if " step " in line and "grad norm" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    for part in ("loss ", "lr ", "grad norm ", " tokens/s", "% of peak"):
        assert all(part in line for line in lines), part
    assert lines[0].endswith("left") and lines[-1].endswith("done")


def test_checkpoints_load_in_plain_transformers(finished: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = _weights(finished / "ckpt-6")
    for folder_format in ({}, {"use_safetensors": False}):
        model = transformers.BertForMaskedLM.from_pretrained(finished / "ckpt-6", **folder_format)
        found = model.state_dict()
        for name, tensor in state.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_pytorch_model_bin_has_the_names_that_the_original_reads(finished: Path) -> None:
    weights = torch.load(finished / "ckpt-6" / "pytorch_model.bin", weights_only=True)
    assert all(name.startswith(("bert.", "cls.predictions.")) for name in weights)
    assert {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"} <= weights.keys()


@pytest.mark.parametrize(("given", "files"), [("bin", {"pytorch_model.bin"}), ("safetensors", {"model.safetensors"})])
def test_format_of_the_weights(given: str, files: set[str], run: Any, tmp_path: Path) -> None:
    assert run(save_format=given, num_training_steps=1)[0] == 0
    folder = tmp_path / "out" / "ckpt-1"
    assert {"pytorch_model.bin", "model.safetensors"} & {path.name for path in folder.iterdir()} == files
    assert not checkpoint.load(folder, for_training=True).missing


@pytest.mark.parametrize("counts", [(3, 0, 0), (3, 4, 0), (3, 4, 4), (0, 4, 0)])
def test_pairs_are_those_of_the_mask(counts: tuple[int, int, int]) -> None:
    from minilm_fast.ops.layout import SequenceLayout

    layout = SequenceLayout.from_counts(*([count] for count in counts))
    mask = layout.dense_mask()[0]
    assert seen_pairs(counts) == int(mask.sum())
    rows = counts[2] or counts[1]
    assert queried_pairs(counts) == int(mask[len(mask) - rows :].sum())


def test_flops_of_a_step_against_pytorchs_counter(place: Path, tmp_path: Path) -> None:
    """Matrix products only, of a forward pass in plain PyTorch: without attention they must agree exactly."""
    trainer = _trainer(place, tmp_path / "out")
    config = trainer.task.module.config
    counts = [(10, 4, 4), (7, 3, 3)]
    tokens, rows, hidden = 31, 7, config.hidden_size
    layer = 2 * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)
    expected = (config.num_hidden_layers - 1) * tokens * layer + rows * layer
    expected += (tokens - rows) * 4 * hidden * hidden
    expected += 2 * rows * (hidden * hidden + hidden * config.vocab_size)
    pairs = (config.num_hidden_layers - 1) * sum(map(seen_pairs, counts)) + sum(map(queried_pairs, counts))
    expected += 4 * hidden * pairs
    assert sequence_to_sequence_flops(config, counts, rows) == pytest.approx(3 * expected)


def test_meter_leaves_skipped_steps_out_of_the_mean() -> None:
    meter = Meter()
    for loss, skipped in ((1.0, False), (float("nan"), True), (3.0, False)):
        meter.add(StepReport([loss], {"loss": loss}, 1.0, 1e-3, 10, 5.0, skipped, 0))
    assert meter.means() == {"loss": 2.0} and meter.tokens == 30 and meter.steps == 3


def test_compatibility_flags_are_accepted() -> None:
    required = ["--train_file=a", "--model_type=bert", "--model_name_or_path=b", "--output_dir=c"]
    flags = "--lmdb_cache --lmdb_dtype i --fp16_opt_level O2 --server_ip a --server_port 1 --local_rank -1 --no_cuda"
    args: argparse.Namespace = build_parser().parse_args([*required, *flags.split(), "--log_dir", "x"])
    assert args.lmdb_cache and args.no_cuda and args.log_dir == Path("x")

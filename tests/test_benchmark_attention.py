"""The benchmark of the attention operators: a whole run on small shapes, and its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import instruction_set, threads

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import attention
import machine

from minilm_fast import ops

SMALL = ["--shape", "tiny", "--batch", "3", "--source", "20", "--step", "4", "--layers", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZES", (64,))
    monkeypatch.setattr(attention, "READ_FLOATS", 1 << 16)


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attention.json"
    with threads(1):
        assert attention.main([*SMALL, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("bidirectional 20 ") == 1 and out.count("pseudo-masked ") == 3
    assert out.count("E 3, B 5, R 2, source 20, step 4, D 32") == 2
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["attention"]) == 5 and len(results["step"]) == 4 and len(results["rows"]) == 3
    assert [t["case"].rpartition(", ")[2] for t in results["training"]] == ["dropout 0", "dropout 0.1"] * 2
    for timing in results["training"]:
        rivals = {f"{rival} {dtype}" for rival in attention.TRAINING_RIVALS for dtype in attention.OURS}
        assert timing["seconds"].keys() == {*attention.OURS, *rivals}
    for timing in results["attention"]:
        assert timing["seconds"].keys() == {*attention.OURS, *attention.RIVALS}
        assert all(seconds > 0 for seconds in timing["seconds"].values())


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.decode_attention
    monkeypatch.setattr(ops, "decode_attention", lambda *arguments: right(*arguments) * 1.01)
    with threads(1):
        assert attention.main(SMALL) == 2
    assert "error: fp32 is wrong by" in capsys.readouterr().err


def test_training_only(capsys: pytest.CaptureFixture[str]) -> None:
    with threads(1):
        assert attention.main([*SMALL, "--training-only", "--dropout", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.count("dropout 0.5") == 2 and "decode_attention" not in out and "fusions" not in out


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.projected_attention

    def other_seed(*arguments: object, seed: torch.Tensor, **options: object) -> object:
        return right(*arguments, seed=seed + 1, **options)

    monkeypatch.setattr(ops, "projected_attention", other_seed)
    with threads(1):
        assert attention.main([*SMALL, "--training-only"]) == 2
    assert "error: fp32 is wrong by" in capsys.readouterr().err


def test_counts_what_the_mask_leaves() -> None:
    layout = attention.layouts(2, 8)["causal 8"]
    timing = attention.measure_attention("causal 8", layout, 3, 4, 1, 1)
    assert timing.operations == 4 * 3 * 4 * 2 * sum(range(1, 9))
    step = attention.Step(examples=2, source=8, step=3, beams=5, rows=2, heads=3, size=4)
    data = attention.StepData(step, 1)
    keys = 2 * (8 + 3 + 1) + 1
    assert step.operations == 4 * 2 * 5 * keys * 3 * 4
    ancestors = data.ancestry[:, :, :3]
    different = sum(len(set(ancestors[e, :, j].tolist())) for e in range(2) for j in range(3))
    assert step.bytes(4, data.entries) == 2 * 4 * 3 * 4 * (2 * 8 + different)


def test_instruction_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with instruction_set("default"), threads(1):
        assert attention.main([*SMALL, "--isa", "default"]) == 0
        assert attention.main([*SMALL, "--isa", "sse9"]) == 2
    assert "error: unknown instruction set 'sse9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1,x"], "not a list of whole numbers: '1,x'"),
        (["--threads", "0"], "must be at least 1: '0'"),
        (["--threads", ""], "must be at least 1"),
        (["--beam", "0"], "--beam must be at least 1"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        attention.main([*SMALL, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

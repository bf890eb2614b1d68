"""The benchmark of the trained fusions: a whole run on small shapes, and its arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("minilm_fast._C", reason="the extension is not built")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import machine
import training_ops

SMALL = ["--rows=20", "--loss-rows=6", "--channels=16", "--intermediate=32", "--vocabulary=300", "--rounds=1"]


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZES", (64,))
    monkeypatch.setattr(training_ops, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(training_ops, "loss_memory", lambda *_: 1_000_000)
    path = tmp_path / "training_ops.json"
    assert training_ops.main([*SMALL, "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("bias_gelu 20 x 32") == 2
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["timings"]) == 6
    for timing in results["timings"]:
        assert {"ours", "eager"} <= timing["seconds"].keys()
        assert min(timing["limit"], *timing["seconds"].values()) > 0


@pytest.mark.parametrize("make", [training_ops.gelu_case, training_ops.loss_case])
@pytest.mark.parametrize("dtype", training_ops.DTYPES)
def test_ours_and_eager_compute_the_same(make: Callable[..., training_ops.Case], dtype: str) -> None:
    case = make(training_ops.Sizes(20, 6, 16, 32, 300), dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    ours, eager = (case.systems[name](*case.inputs).float() for name in ("ours", "eager"))
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)


def test_memory_of_one_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_ops.main([*SMALL, "--memory-of=ours"]) == 0
    assert int(capsys.readouterr().out) >= 0


@pytest.mark.parametrize("arguments", ["--rows=0", "--threads=1,x", "--rounds=-1"])
def test_bad_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_ops.main([arguments])
    assert f"argument {arguments.partition('=')[0]}: " in capsys.readouterr().err

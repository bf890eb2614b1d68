"""The benchmark of the linear layers: a whole run on small shapes, and its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from kernel_checks import instruction_set

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import linear
import machine

SMALL = ["--shape", "tiny", "--rows", "3,40", "--head-rows", "2", "--layers", "2", "--rounds", "1"]


@pytest.fixture
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZES", (64,))


@pytest.mark.usefixtures("small_peak")
def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "linear.json"
    assert linear.main([*SMALL, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count("3 x 64 -> 192 ") == 1 and out.count("40 x 64 -> 128 GELU ") == 1
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["linear"]) == 8 and len(results["head"]) == 1
    for timing in results["linear"] + results["head"]:
        assert {"F.linear", "fp32", "bf16", "int8"} <= timing["rates"].keys()
        assert all(rate > 0 for rate in timing["rates"].values())
    assert all(rate > 0 for rate in results["peak"]["1"].values())


@pytest.mark.usefixtures("small_peak")
def test_one_format_on_a_lesser_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    with instruction_set("default"):
        assert linear.main([*SMALL, "--formats", "bf16", "--isa", "default"]) == 0
    assert "int8" not in capsys.readouterr().out.splitlines()[1]


def test_unknown_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert linear.main([*SMALL, "--isa", "sse9"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: unknown instruction set 'sse9'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "3,x"], "not a list of whole numbers: '3,x'"),
        (["--threads", "0"], "must be at least 1: '0'"),
        (["--formats", "fp16"], "unknown format 'fp16'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        linear.parse_arguments(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_operations() -> None:
    assert linear.Product(3, 5, 7, False).operations == 2 * 3 * 5 * 7
    names = [p.name for p in linear.products(linear.SHAPES["l12-h384"], [320])]
    assert names == ["320 x 384 -> 1152", "320 x 384 -> 384", "320 x 384 -> 1536 GELU", "320 x 1536 -> 384"]

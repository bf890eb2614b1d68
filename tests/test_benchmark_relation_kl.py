"""The benchmark of the distillation loss: a whole run on small shapes, and its arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from kernel_checks import threads

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import machine
import relation_kl

from minilm_fast import ops

SMALL = ["--batch", "3", "--length", "20", "--rounds", "1", "--memory_lengths", "32"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZES", (64,))


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "relation_kl.json"
    with threads(1):
        assert relation_kl.main([*SMALL, "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("q-k, 12 heads, 20 ") == 1
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["timings"]) == 5
    for timing in results["timings"]:
        assert timing["seconds"].keys() == {*relation_kl.OURS, *relation_kl.RIVALS}
        assert all(seconds > 0 for seconds in timing["seconds"].values())
    (memory,) = results["memory"]
    assert memory["matrix"] == 3 * 12 * 32 * 32 * 4
    assert memory["peak"].keys() == {*relation_kl.OURS, "dense"}


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.relation_kl

    def wrong(*arguments: object, **options: object) -> object:
        loss = right(*arguments, **options)
        return loss if loss.dtype.itemsize == 8 else loss * 1.01

    monkeypatch.setattr(ops, "relation_kl", wrong)
    with threads(1):
        assert relation_kl.main(SMALL) == 2
    assert "error: fp32 is wrong by" in capsys.readouterr().err


def test_counts_what_is_needed() -> None:
    distinct = relation_kl.Case("", (3, 5), 2, 8, 4, False)
    pairs = 2 * (3 * 3 + 5 * 5)
    assert distinct.operations == pairs * (2 * 8 + 2 * 4 + 2 * 2 * 4)
    symmetric = relation_kl.Case("", (3, 5), 2, 8, 4, True)
    assert symmetric.operations == pairs * ((2 * 8 + 2 * 4) / 2 + 2 * 4)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert relation_kl.main([*SMALL, "--isa", "sse9"]) == 2
    assert "error: unknown instruction set 'sse9'" in capsys.readouterr().err
    for arguments, message in ((["--batch", "0"], "--batch must be at least 1"), (["--threads", "x"], "'x'")):
        with pytest.raises(SystemExit) as stop:
            relation_kl.main([*SMALL, *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

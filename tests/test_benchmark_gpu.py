"""The GPU benchmark and its script, as far as they run without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--device", "cpu", "--shape", "tiny", "--batch", "2", "--source", "12", "--target", "4", "--beams", "2"]
TINY += ["--steps", "3", "--rounds", "1", "--dtype", "fp32"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_cases_run_on_a_cpu(tmp_path: Path) -> None:
    record = tmp_path / "gpu.json"
    done = _run(*TINY, "--cases", "decode_attention,vocabulary,decoding", "--json", str(record))
    assert done.returncode == 0, done.stderr
    results = json.loads(record.read_text())["results"]
    assert [r["case"] for r in results] == [
        "decode_attention, 2 layers",
        "lm_head_topk",
        "decoding, batch 1",
    ]
    assert all(r["seconds"]["ours"] > 0 for r in results)
    assert "product, log-softmax, top-k" in done.stdout


def test_unknown_case() -> None:
    done = _run("--cases", "everything")
    assert done.returncode != 0 and "everything" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--out", str(tmp_path / "out"), "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "finds no GPU: nothing was run" in done.stderr


def test_the_script_refuses_unknown_sections(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--out", str(tmp_path), "--sections", "build,all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no section all" in done.stderr

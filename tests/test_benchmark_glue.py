"""The benchmark that fine-tunes GLUE tasks over several seeds, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from understanding_files import MODEL, sentences, write_table, write_vocabulary

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "glue.py"
sys.path.append(str(SCRIPT.parent))

from runs import mean_and_spread  # noqa: E402


def test_mean_and_spread() -> None:
    assert mean_and_spread([]) == "-" and mean_and_spread([0.5]) == "50.0 (1)"
    assert mean_and_spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0 (3)"


def test_from_seeds_to_a_table(tmp_path: Path) -> None:
    """What is in the results is not done again."""
    pytest.importorskip("psutil")
    shutil.copytree(MODEL, tmp_path / "model")
    write_vocabulary(tmp_path / "model")
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for split, count in (("train", 24), ("dev", 12)):
        rows = [(kind, 1, 2, first, second) for first, second, kind in sentences(count, 2, len(split))]
        write_table(tmp_path / "glue" / "MRPC" / f"{split}.tsv", header, rows)
    command = [sys.executable, SCRIPT, "--model", tmp_path / "model", "--glue", tmp_path / "glue", "--tasks", "mrpc"]
    command += ["--output", tmp_path / "out", "--epochs", "1", "--batch", "8", "--max-seq-length", "20", "--fp32"]
    command += ["--threads", "1", "--flags=--peak_tflops=0.1", "--seeds"]

    def run(seeds: int) -> dict[str, dict[str, float]]:
        words = [str(word) for word in [*command, seeds]]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"({seeds})" in done.stdout and "MRPC F1" in done.stdout and "88.9" in done.stdout
        return json.loads((tmp_path / "out" / "results.json").read_text())["runs"]

    before = run(1)
    assert before["mrpc 0"]["steps"] == 3 and {"dev_accuracy", "dev_f1", "seconds"} <= before["mrpc 0"].keys()
    after = run(2)
    assert set(after) == {"mrpc 0", "mrpc 1"} and after["mrpc 0"] == before["mrpc 0"]
    assert not (tmp_path / "out" / "mrpc-1").exists()

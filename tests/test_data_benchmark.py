"""The benchmark of the data pipeline on a small file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_benchmark_of_the_data_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rng = random.Random(0)
    words = ["the", "history", "of", "a", "city"]
    lines = [
        json.dumps({"src": " ".join(rng.choices(words, k=rng.randint(1, 60))), "tgt": rng.choice(words)})
        for _ in range(200)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "data_pipeline.py"), "--data", str(tmp_path / "data.jsonl")]
    command += ["--batch-sizes", "8", "--epochs", "4", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["in_memory"]["examples"] == 200
    assert set(results["masked"]) >= {"v0", "v1", "v2"} and min(results["masked"].values()) > 0
    # Every target has as many tokens: only a budget, which takes more short examples into a batch, can favour any.
    for name, (by_length, _) in results["weights"].items():
        favoured = "tokens" in name
        assert (max(by_length) > 1.05) is favoured, name
        assert "weight of a label" in done.stdout and name in done.stdout

"""The distillation benchmark in miniature."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "distillation.py"


def run(*arguments: object, script: Path = SCRIPT) -> str:
    words = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_split(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    sizes = ("--teacher", "tiny", "--student", "tiny", "--length", 16, "--batch", 2, "--threads", 1, "--rounds", 2)
    out = run("split", *sizes, "--json", tmp_path / "split.json")
    assert "v1 fp32 cpu-s" in out and "v2 bf16 s" in out
    results = json.loads((tmp_path / "split.json").read_text())
    assert [(r["preset"], r["dtype"]) for r in results["runs"]] == [
        (preset, dtype) for dtype in ("fp32", "bf16") for preset in ("v1", "v2")
    ]
    for parts in (run["seconds"] for run in results["runs"]):
        assert parts.keys() >= {"teacher", "loss forward"} and all(value > 0 for value in parts.values())


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": step, "qk": 1 / step, "dev_qk": 2 / step, "dev_loss": 2 / step} for step in (1, 2, 3)]
    (tmp_path / "history.json").write_text(json.dumps({"best": None, "records": records}))
    run("plot", tmp_path / "history.json", "--out", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_students_from_distillation_to_table(tmp_path: Path) -> None:
    """What is in the results is not done again."""
    pytest.importorskip("psutil")
    teacher = tmp_path / "teacher"
    shutil.copytree(Path(__file__).parent / "goldens" / "distillation" / "teacher", teacher)
    words = [f"w{i}" for i in range(92)]
    (teacher / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    (tmp_path / "text.txt").write_text(" ".join(words))
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = [f"{i}\tw{i}\tw{i + 1}\t{'not_' * (i % 2)}entailment" for i in range(8)]
        (folder / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    arguments = ["--teacher", teacher, "--corpus", tmp_path / "text.txt", "--glue", tmp_path / "glue", "--output"]
    arguments += [tmp_path / "out", "--sizes", "l3-h192", "--presets", "v2", "--tasks", "rte", "--threads", 1]
    arguments += ["--distill-steps", 2, "--distill-length", 16, "--steps", 2, "--max-seq-length", 16, "--seeds"]
    script = SCRIPT.with_name("distilled_students.py")
    assert "l3-h192 random" in run(*arguments, 1, script=script)
    before = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert set(before) == {"l3-h192 v2 rte 0", "l3-h192 random rte 0"}
    assert "(2)" in run(*arguments, 2, script=script)
    after = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert len(after) == 4 and all(after[name] == value for name, value in before.items())

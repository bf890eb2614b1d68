"""The comparison with the official programs, on the goldens."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "metrics"


def compare(*argv):
    command = [sys.executable, ROOT / "benchmarks" / "metrics.py", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def test_both_comparisons(tmp_path):
    lines = (GOLDENS / "questions.jsonl").read_text(encoding="utf8").splitlines()
    questions = [{"id": str(number), **json.loads(line)} for number, line in enumerate(lines)]
    data = "".join(json.dumps(record) + "\n" for record in questions).encode()
    (tmp_path / "gold.jsonl.xz").write_bytes(lzma.compress(data))
    scores = json.loads((GOLDENS / "questions_scores.json").read_text())
    names = {"sentence": "sentence_key", "passage": "passage_answer_key", "none": "line_key"}
    official = {
        names[key]: {"BLEU4": found["bleu4"], "ROUGE_L": found["rougeL"] + (0.25 if key == "none" else 0)}
        for key, found in scores.items()
    }
    (tmp_path / "expected.json").write_text(json.dumps({"test": official}))
    cases = [json.loads(line) for line in (GOLDENS / "rouge155.jsonl").read_text(encoding="utf8").splitlines()]
    cases[0]["rouge155"]["rouge_1_f_score"] += 0.5
    with open(tmp_path / "cases.jsonl", "w", encoding="utf8") as file:
        file.writelines(json.dumps({"dataset": "d", "system": "s", **case}) + "\n" for case in cases)
    gold = tmp_path / "gold.jsonl.xz"
    found = compare(
        *("--gold", gold, "--predictions", gold, "--expected", tmp_path / "expected.json"),
        *("--rouge", tmp_path / "cases.jsonl"),
    )
    assert found.returncode == 0, found.stderr
    assert "largest difference 0.2500" in found.stdout
    assert "1 cases deviate in some F:" in found.stdout
    row = next(line.split() for line in found.stdout.splitlines() if line.startswith("all") and "ROUGE-1" in line)
    assert row[1] == str(len(cases)) and row[4] == f"{(len(cases) - 1) / len(cases):.2%}"


def test_a_missing_file_is_one_line(tmp_path):
    found = compare("--rouge", tmp_path / "missing")
    assert found.returncode != 0 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1

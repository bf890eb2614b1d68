"""The decoding benchmark: its operation counts, its statistics, and a whole run on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmark_command import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))

from harness import Series
from shapes import SHAPES, DecodeWorkload
from work import encoder_decoder, masked_query_decoder, pseudo_masked_training

SHAPE = SHAPES["tiny"]
LOAD = DecodeWorkload(batch=1, beam=3, source=11, steps=5)


def product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attend(keys: int) -> int:
    """Scores and weighted sum of one query row, all heads."""
    return 2 * product(1, SHAPE.hidden, keys)


def block(rows: int) -> int:
    """Everything in a layer but the projections to queries, keys and values and the attention."""
    d, f = SHAPE.hidden, SHAPE.intermediate
    return product(rows, d, d) + product(rows, d, f) + product(rows, f, d)


def test_masked_query_decoder_counts_every_step() -> None:
    d, source = SHAPE.hidden, LOAD.source
    vocabulary = product(1, d, d) + product(1, d, SHAPE.vocab)
    total = 0
    for layer in range(SHAPE.layers):
        last = layer == SHAPE.layers - 1
        total += product(source, d, 2 * d) + attend(source + 1) + product(1, d, d) + block(1)
        if not last:
            total += product(source, d, d) + block(source) + source * attend(source) + product(1, d, 2 * d)
        else:
            total += product(1, d, 2 * d)
    total += vocabulary
    for step in range(1, LOAD.steps):
        for _ in range(LOAD.beam):
            for layer in range(SHAPE.layers):
                token_keys = source + step
                total += product(2, d, 2 * d) + product(1, d, d) + attend(token_keys + 1) + block(1)
                if layer < SHAPE.layers - 1:
                    total += product(1, d, d) + attend(token_keys) + block(1)
            total += vocabulary
    assert masked_query_decoder(SHAPE, LOAD).total == total


def test_encoder_decoder_counts_every_step() -> None:
    d, source = SHAPE.hidden, LOAD.source
    total = 0
    for _ in range(SHAPE.layers):
        total += product(source, d, 3 * d) + block(source) + source * attend(source)
        total += product(source, d, 2 * d)
        for step in range(LOAD.steps):
            per_row = product(1, d, 3 * d) + attend(step + 1) + product(1, d, d)
            per_row += product(1, d, d) + attend(source) + block(1)
            total += LOAD.beam * per_row
    total += LOAD.beam * LOAD.steps * product(1, d, SHAPE.vocab)
    assert encoder_decoder(SHAPE, LOAD).total == total


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that is ten times slower in the second round leaves the ratio alone."""

    def runs(*cpu: float) -> Series:
        return Series([{"cpu": value, "wall": value, "sequences": 2} for value in cpu])

    assert runs(3.0, 30.0, 3.0).ratio_to(runs(1.0, 10.0, 1.0), "cpu") == pytest.approx(3.0)
    assert runs(3.0, 30.0, 4.0).median("cpu") == 2.0


def test_a_run_measures_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    saved = tmp_path / "run.json"
    sizes = ["--shape", "tiny", "--batch", "2", "--beam", "2", "--source", "12", "--steps", "4"]
    done = run(
        "decode.py", *sizes, "--peers", "", "--dtypes", "fp32", "--rounds", "2", "--threads", "1", "--json", str(saved)
    )
    assert done.returncode == 0, done.stderr
    assert "minilm_fast fp32" in done.stdout
    results = json.loads(saved.read_text(encoding="utf-8"))
    (system,) = results["systems"]
    assert len(system["batch"]) == len(system["alone"]) == 2
    assert all(found["steps"] == 4 and found["cpu"] > 0 for found in system["batch"])
    stages = {name.partition(":")[0] for name, seconds in system["breakdown"].items() if seconds > 0}
    assert {"source", "step", "vocabulary", "search"} <= stages
    assert run("report.py", str(saved)).stdout == done.stdout


def test_training_counts_what_must_be_computed() -> None:
    d, f, source, target = SHAPE.hidden, SHAPE.intermediate, 7, 3
    tokens = source + 2 * target
    linear = attention = 0
    for layer in range(SHAPE.layers):
        last = layer == SHAPE.layers - 1
        rows = target if last else tokens
        linear += product(tokens, d, 2 * d) + product(rows, d, d) + block(rows)
        for row in range(tokens - rows, tokens):
            if row < source:
                attention += attend(source)
            elif row < source + target:
                attention += attend(row + 1)
            else:
                attention += attend(row - target + 1)
    linear += product(target, d, d) + product(target, d, SHAPE.vocab)
    assert f == SHAPE.intermediate
    assert pseudo_masked_training(SHAPE, source, target) == (3 * linear, 3 * attention)


def test_training_is_measured_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    saved = tmp_path / "run.json"
    sizes = ["--shape", "tiny", "--lengths", "9,3", "--examples", "4", "--batch", "2", "--max-source", "9"]
    done = run("training.py", *sizes, "--max-target", "3", "--rounds", "1", "--threads", "1", "--json", str(saved))
    assert done.returncode == 0, done.stderr
    systems = json.loads(saved.read_text(encoding="utf-8"))["systems"]
    assert [(s["name"], s["dtype"]) for s in systems[:3]] == [
        ("minilm_fast", "fp32"),
        ("original's algorithm", "fp32"),
        ("hf", "fp32"),
    ]
    losses = [system["batch"][0]["loss"] for system in systems]
    # Random weights all predict about evenly: the smoothed loss of every system is near that of guessing.
    assert all(7 < loss < 12 for loss in losses), losses
    assert "times faster" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--source", "500", "--steps", "48"], "--source 500"),
        (["--source", "2"], "--source 2"),
        (["--json", "no-such-folder/run.json"], "no-such-folder"),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], named: str) -> None:
    done = run("decode.py", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and named in line


def test_data_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    for script in ("mixed_lengths.py", "dtype_agreement.py"):
        done = run(script, "--data", str(tmp_path / "none.jsonl"), "--model", str(tmp_path))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: --data") and "none.jsonl" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"src": "one text"}\n')
    model = Path(__file__).parent / "goldens" / "tiny"
    done = run("dtype_agreement.py", "--data", str(data), "--model", str(model), "--device", "cuda")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: device cuda: PyTorch finds no GPU"
    assert "fp32 on cpu" not in done.stderr


def test_history_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = tmp_path / "history.json"
    records = [{"step": s, "learning_rate": 0.1, "loss": 3 / s, "dev_loss": 2 / s, "dev_bleu4": s} for s in (1, 2)]
    history.write_text(json.dumps({"records": records}))
    assert run("plot_history.py", str(history), "--batch", "4", "--out", str(tmp_path / "run.png")).returncode == 0
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    history.write_text("{}")
    done = run("plot_history.py", str(history), "--out", str(tmp_path / "other.png"))
    assert done.returncode == 2 and "is no history" in done.stderr

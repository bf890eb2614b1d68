"""The encoder benchmark: its cases, its goals, and a whole run on a tiny model."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_command import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))

import encoder
import encoder_report
import encoder_texts
from peers.encoder_base import Case, EncoderJob, Padded
from peers.encoder_openvino import OpenVino
from peers.encoders import ENCODERS, offered
from shapes import SHAPES
from work import encoder as work_of_encoder

from minilm_fast.errors import UserError

SIZES = ["--shape", "tiny", "--equal", "2x9,1x6", "--count", "7", "--batch", "3", "--settle", "0.01", "--threads", "1"]


def test_a_run_measures_checks_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    pytest.importorskip("transformers")
    saved, docs = tmp_path / "run.json", tmp_path / "speed.md"
    docs.write_text(f"before\n\n{encoder_report.BEGIN}\nold\n{encoder_report.END}\nafter\n")
    done = run(
        "encoder.py", *SIZES, "--peers", "torch sdpa,ctranslate2", "--dtypes", "fp32", "--rounds", "2",
        "--json", str(saved), "--docs", str(docs),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(saved.read_text(encoding="utf-8"))
    cases = {case["name"]: case for case in results["cases"]}
    assert list(cases) == ["batch 2, length 9", "batch 1, length 6", "mixed, as they come", "mixed, by length"]
    assert cases["batch 2, length 9"]["tokens"] == 18
    mixed, ordered = cases["mixed, as they come"], cases["mixed, by length"]
    assert mixed["tokens"] == sum(mixed["lengths"]) == ordered["tokens"] <= ordered["padded"] <= mixed["padded"]
    (one,) = results["runs"]
    systems = {system["name"]: system for system in one["systems"]}
    assert {"minilm_fast", "torch sdpa"} <= systems.keys()
    assert set(one["left_out"]) <= {"ctranslate2 fp32"}
    for system in systems.values():
        assert all(len(runs) == 2 and runs[0]["wall"] > 0 for runs in system["runs"].values())
    ours = systems["minilm_fast"]["agreement"]
    # The reference is another system's: ours really computes the same.
    assert all(0 < found["difference"] < 1e-5 for found in ours.values())
    assert run("encoder_report.py", str(saved)).stdout == done.stdout
    written = docs.read_text(encoding="utf-8")
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert "**minilm_fast fp32**" in written


def test_int8_alone_is_compared_with_fp32(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    saved = tmp_path / "run.json"
    done = run("encoder.py", *SIZES, "--peers", "", "--dtypes", "int8", "--rounds", "1", "--json", str(saved))
    assert done.returncode == 0, done.stderr
    (system,) = json.loads(saved.read_text(encoding="utf-8"))["runs"][0]["systems"]
    assert system["dtype"] == "int8"
    assert all(0.9 < found["least_cosine"] < 1 - 1e-6 for found in system["agreement"].values())


def test_what_computes_something_else_is_left_out() -> None:
    def agreement(difference: float, cosine: float) -> dict[str, dict[str, float]]:
        return {"a case": {"difference": difference, "mean_cosine": cosine, "least_cosine": cosine - 0.3}}

    assert encoder._disagreement("fp32", agreement(1e-6, 1.0)) == ""
    assert "differ by 0.001" in encoder._disagreement("fp32", agreement(1e-3, 1.0))
    assert encoder._disagreement("int8", agreement(1e-3, 0.99)) == ""
    assert "mean cosine of only 0.500 to the reference (a case)" in encoder._disagreement("int8", agreement(0.3, 0.5))
    assert encoder._disagreement("fp32", agreement(float("nan"), float("nan")))


def test_cases() -> None:
    sequences = [[2, 10, 11, 3], [2, 12, 3], [2, 13, 14, 15, 16, 3]]
    equal = encoder_texts.equal_case(2, 5, sequences)
    assert equal.batches == [[[2, 10, 11, 12, 3], [2, 13, 14, 15, 3]]]
    assert equal.fixed and equal.tokens == equal.padded == 10
    come, ordered = encoder_texts.mixed_cases(sequences, 2)
    assert come.batches == [[sequences[0], sequences[1]], [sequences[2]]]
    assert ordered.batches == [[sequences[1], sequences[0]], [sequences[2]]]
    assert (come.tokens, come.padded, come.sequences, come.fixed) == (13, 14, 3, False)
    assert not Case("one by one", [[[2, 3]], [[2, 4, 3]]]).fixed


def test_padding() -> None:
    feed = Padded.from_sequences([[5, 6, 7], [8]]).feed()
    assert np.array_equal(feed["input_ids"], [[5, 6, 7], [8, 0, 0]])
    assert np.array_equal(feed["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    assert not feed["token_type_ids"].any()


def test_openvino_int8_gets_no_batch_as_long_as_a_head_is_wide(tmp_path: Path) -> None:
    """See :class:`peers.encoder_openvino.OpenVino`."""
    for dtype, expected in (("int8", [[4], [6], [6]]), ("fp32", [[4], [5], [6]])):
        peer = OpenVino(EncoderJob(tmp_path, tmp_path, dtype, 1), [])
        peer._head_size = 5
        found = [peer.ready([[2] * length, [2, 3]]) for length in (4, 5, 6)]
        assert [[feed["input_ids"].shape[1]] for feed in found] == expected
        assert all(feed["attention_mask"].sum() == length + 2 for feed, length in zip(found, (4, 5, 6), strict=True))


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    tsv = tmp_path / "dev.tsv.xz"
    tsv.write_bytes(lzma.compress(b"index\tsentence1\tsentence2\tlabel\n0\ta b\tc\tyes\n1\td\te\tno\n"))
    assert encoder_texts.read(tsv) == ["a b", "c", "d", "e"]
    squad = tmp_path / "dev.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "p", "qas": [{"question": "q"}]}]}]}))
    assert encoder_texts.read(squad) == ["p", "q"]
    plain = tmp_path / "lines.txt"
    plain.write_text("one\n\n two \n")
    assert encoder_texts.read(plain) == ["one", "two"]
    for name, content in (("empty.txt", "\n"), ("bad.json", "[]"), ("none.tsv", "a\tb\n1\t2\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            encoder_texts.read(tmp_path / name)
    chosen = encoder_texts.choose([["a", "b", "c"], ["x", "y", "z"]], 4, seed=1)
    assert len(chosen) == 4 and sum(text in "abc" for text in chosen) == 2


def test_operations() -> None:
    shape, length = SHAPES["tiny"], 7
    d, f = shape.hidden, shape.intermediate
    linear = 2 * length * (4 * d * d + 2 * d * f)
    assert work_of_encoder(shape, length) == shape.layers * (linear + 2 * 2 * length * length * d)


def test_goals_are_judged_by_ratios_within_a_round() -> None:
    def system(name: str, *walls: float) -> dict[str, object]:
        return {"name": name, "dtype": "fp32", "runs": {"c": [{"wall": w, "cpu": w, "sequences": 1} for w in walls]}}

    one = {"systems": [system("minilm_fast", 1.0, 10.0, 1.0), system("torch eager", 1.5, 15.0, 9.0)]}
    goal = encoder_report.GOALS[0]
    assert encoder_report.reached(one, goal, {"name": "c"}) == pytest.approx(1.5)
    assert encoder_report.reached({"systems": one["systems"][:1]}, goal, {"name": "c"}) is None


def test_every_peer_says_its_dtypes_without_its_library() -> None:
    assert offered("onnxruntime") == ("fp32", "int8")
    assert all(set(offered(name)) <= set(encoder.DTYPES) for name in ENCODERS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--texts", "no-such-file.tsv"], "no-such-file.tsv"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--json", "no-such-folder/run.json"], "no-such-folder"),
        (["--docs", "no-such-file.md"], "no-such-file.md"),
        (["--threads", "100000"], "--threads 100000"),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], named: str) -> None:
    done = run("encoder.py", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and named in line


def test_model_sizes_are_measured_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    pytest.importorskip("transformers")
    saved = tmp_path / "sizes.json"
    sizes = [
        "--base",
        "tiny",
        "--models",
        "l6-h384",
        "--lengths",
        "8",
        "--batches",
        "1,2",
        "--rounds",
        "1",
        "--settle",
        "0",
    ]
    done = run("model_sizes.py", *sizes, "--threads", "1", "--json", str(saved))
    assert done.returncode == 0, done.stderr
    found = {(r["system"], r["model"], r["batch"]) for r in json.loads(saved.read_text(encoding="utf-8"))["runs"]}
    systems = ("torch eager", "minilm_fast")
    assert found == {(s, m, b) for s in systems for m in ("tiny", "l6-h384") for b in (1, 2)}
    assert "8 x 2" in done.stdout and "not measured" not in done.stdout
    done = run("model_sizes.py", "--lengths", "513")
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: --lengths 513: the models have 512 positions"]

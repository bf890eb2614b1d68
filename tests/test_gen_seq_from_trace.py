"""Choosing outputs anew from score traces: the original's answers, its quirks, and damaged traces."""

import json
import math
import pickle
import shutil

import pytest

from minilm_fast import gen_seq_from_trace, safe_pickle
from minilm_fast.decoding.trace import best_sequence, padded_lengths, trim_punctuation, write_traces
from tests.command import GOLDENS, TOKENIZER, Runner

CASES = json.loads((GOLDENS / "trace" / "gen_seq_from_trace.json").read_text(encoding="utf8"))
SEP, PAD = 3, 0


@pytest.fixture
def run(capfdbinary):
    return Runner(capfdbinary)


def _flags(values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def _place(folder, stem):
    for name in (stem, f"{stem}.trace.pickle"):
        shutil.copy(GOLDENS / "trace" / name, folder / name)
    return folder / stem


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["trace_pickle"].split("/")[1].split(".")[0])
def test_goldens(case, run, tmp_path):
    name = _place(tmp_path, case["trace_pickle"].split("/")[1].removesuffix(".trace.pickle"))
    for golden in case["runs"]:
        outcome = run(gen_seq_from_trace.main, "--input", name, *TOKENIZER, *_flags(golden["args"]))
        assert outcome.status == 0, outcome
        lines = (tmp_path / f"{name.name}{golden['output_suffix']}").read_bytes().decode().split("\n")
        assert lines == [*golden["lines"], ""], golden["args"]


def test_a_pattern_takes_every_file_with_traces(run, tmp_path):
    _place(tmp_path, "t_beam4")
    _place(tmp_path, "synthetic")
    (tmp_path / "t_other").write_text("an output without traces\n")
    assert run(gen_seq_from_trace.main, "--input", tmp_path / "*", *TOKENIZER, "--alpha", "0.9").status == 0
    written = sorted(path.name for path in tmp_path.iterdir() if "alp" in path.name)
    assert written == ["synthetic.alp0.9", "t_beam4.alp0.9"]


def test_the_traces_are_enough(run, tmp_path):
    name = _place(tmp_path, "synthetic")
    name.unlink()
    assert run(gen_seq_from_trace.main, "--input", name, *TOKENIZER).status == 0
    assert (tmp_path / "synthetic.").exists()


def test_no_traces(run, tmp_path):
    assert "no " in run(gen_seq_from_trace.main, "--input", tmp_path / "x", *TOKENIZER).error()


def test_malicious_traces_run_nothing(run, tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    header = pickle.dumps({"version": 0.0, "num_samples": 1})
    (tmp_path / "x.trace.pickle").write_bytes(header + pickle.dumps(Attack()))
    line = run(gen_seq_from_trace.main, "--input", tmp_path / "x", *TOKENIZER).error()
    assert "x.trace.pickle" in line and "refused" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.trace.pickle"]


def test_cut_off_traces_write_nothing(run, tmp_path):
    data = (GOLDENS / "trace" / "t_beam4.trace.pickle").read_bytes()
    (tmp_path / "x.trace.pickle").write_bytes(data[: len(data) // 2])
    assert "cut off" in run(gen_seq_from_trace.main, "--input", tmp_path / "x", *TOKENIZER).error()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.trace.pickle"]


def test_a_pointer_out_of_its_frame(run, tmp_path):
    trace = {"scores": [[-1.0, -2.0]] * 2, "wids": [[7, 8], [SEP, SEP]], "ptrs": [[0, 0], [5, 5]]}
    with open(tmp_path / "x.trace.pickle", "wb") as stream:
        safe_pickle.dump({"version": 0.0, "num_samples": 1}, stream)
        safe_pickle.dump(trace, stream)
    line = run(gen_seq_from_trace.main, "--input", tmp_path / "x", *TOKENIZER).error()
    assert "trace 1" in line and "beam 5" in line


@pytest.mark.parametrize("flag", ["alpha", "length_penalty", "expect"])
def test_numbers_must_be_finite(flag, run, tmp_path):
    assert f"--{flag}" in run(gen_seq_from_trace.main, "--input", "x", *TOKENIZER, f"--{flag}", "nan").error()


def test_an_alpha_beyond_all_numbers(run, tmp_path):
    name = _place(tmp_path, "t_beam4")
    assert "--alpha" in run(gen_seq_from_trace.main, "--input", name, *TOKENIZER, "--alpha", "1e9").error()


def test_written_traces_are_the_originals_bytes(tmp_path):
    """The same numbers give the same file, to the byte, as the original's pickling."""
    for path in sorted((GOLDENS / "trace").glob("*.trace.pickle")):
        traces = list(safe_pickle.load_traces(path))
        frames = [len(trace["scores"]) for trace in traces]
        # As a journal gives them back.
        write_traces(tmp_path / "out", json.loads(json.dumps(traces)), frames)
        assert (tmp_path / "out").read_bytes() == path.read_bytes(), path.name


def test_traces_are_padded_to_the_originals_batches():
    for path in sorted((GOLDENS / "decode").glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf8")).get("cases", ()):
            if "traces" not in case:
                continue
            args = case["args"]
            special = 1 if args.get("pos_shift") else 2
            limit = args["max_seq_length"] - args["max_tgt_length"] - special
            inputs = json.loads((GOLDENS / "tiny" / "inputs_tokenized.json").read_text(encoding="utf8"))
            lengths = [min(len(item["src_ids"]), limit) + special for item in inputs]
            found = padded_lengths(lengths, args["batch_size"], args["max_tgt_length"], args["max_seq_length"])
            assert found == [trace["output_length"] for trace in case["traces"]]


def test_padding_with_another_pad_id():
    """Zero padding is not taken for tokens where ``[PAD]`` has another id: the last real frame counts."""
    trace = {"scores": [[-1.0, -2.0], [-1.5, -2.5]], "wids": [[7, 8], [9, 6]], "ptrs": [[0, 0], [0, 1]]}
    padded = {key: rows + [[type(rows[0][0])(0)] * 2] * 3 for key, rows in trace.items()}
    assert best_sequence(padded, sep_id=2, pad_id=1) == best_sequence(trace, sep_id=2, pad_id=1) == [7, 9]


@pytest.mark.parametrize(
    "trace", [{"scores": [], "wids": [], "ptrs": []}, {"scores": [[0.0]], "wids": [[0]], "ptrs": [[0]]}]
)
def test_a_trace_without_hypotheses(trace):
    assert best_sequence(trace, SEP, PAD) == []


def test_criteria():
    """Scores -1 at length 1 and -2.5 at length 4."""
    trace = {
        "scores": [[-1.0, -0.5], [-30.0, -1.0], [-40.0, -1.5], [-50.0, -2.5]],
        "wids": [[SEP, 7], [8, 8], [9, 9], [SEP, SEP]],
        "ptrs": [[0, 0], [0, 1], [0, 1], [0, 1]],
    }
    short, long = [SEP], [7, 8, 9, SEP]
    assert best_sequence(trace, SEP, PAD) == short
    assert best_sequence(trace, SEP, PAD, length_penalty=1.0) == long  # 0 against 1.5
    assert best_sequence(trace, SEP, PAD, length_penalty=1.0, expect=4) == long  # -4 against -2.5
    assert best_sequence(trace, SEP, PAD, alpha=3.0) == long  # -1 against -2.5 / 1.5 ** 3
    assert best_sequence(trace, SEP, PAD, alpha=3.0, length_penalty=-1.0) == short
    assert math.isclose(2.5 / 1.5**3, 0.7407, abs_tol=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b . . . .", "a b ."),
        ("a . . . .", "a ."),
        (". . . .", ". . . ."),
        ("a b c d . . . . . . .", "a b c d ."),
        ("a b ... ...", "a b ... ..."),
        ("a b x x x x", "a b x x x x"),
        ("a . ! . !", "a . ! . !"),
    ],
)
def test_punctuation_at_the_end(words, expected):
    assert " ".join(trim_punctuation(words.split(" "))) == expected

"""``minilm_fast.decode``: flags, files, formats and reports."""

import gzip
import io
import json
import lzma
import pickle
import shutil
import sys

import pytest

from minilm_fast import decode, safe_pickle
from minilm_fast.decoding.options import SearchOptions
from minilm_fast.modeling.model import Model
from tests.command import BEAM, GOLDENS, INPUTS, LENGTHS, MODEL, T_BEAM4, TINY, TOKENIZER, Runner, write_inputs

WITHOUT_EFFECT = ["--no_cuda", "--tokenized_input", "--s2s_special_token", "--s2s_add_segment", "--s2s_share_segment"]
# What the original's parser sets where a flag is not given.
ORIGINAL_DEFAULTS = {
    "max_seq_length": 512,
    "fp16": False,
    "split": "",
    "subset": 0,
    "seed": 123,
    "beam_size": 1,
    "length_penalty": 0,
    "forbid_duplicate_ngrams": False,
    "forbid_ignore_word": None,
    "ngram_size": 3,
    "min_len": 1,
    "need_score_traces": False,
    "mode": "s2s",
    "max_tgt_length": 128,
    "pos_shift": False,
    "cache_dir": None,
    "config_path": None,
    "output_file": None,
    **{flag.removeprefix("--"): False for flag in WITHOUT_EFFECT},
}


@pytest.fixture
def run(capfdbinary):
    runner = Runner(capfdbinary)
    return lambda *argv: runner(decode.main, *argv)


def _case(group, **wanted):
    """The first golden case of a group with these arguments; lines of unsafe examples are None."""
    for case in json.loads((GOLDENS / "decode" / f"{group}.json").read_text(encoding="utf8"))["cases"]:
        if all(case["args"].get(name) == value for name, value in wanted.items()):
            return [None if i in case["unsafe"] else line for i, line in enumerate(case["lines"])]
    raise AssertionError(f"no case {wanted} in {group}")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed_input(pack, run, tmp_path):
    (tmp_path / "in").write_bytes(pack(INPUTS.read_bytes()))
    argv = [*MODEL, "--subset", "5", "--output_file", "-"]
    assert run(*argv, "--input_file", tmp_path / "in").out == run(*argv, "--input_file", INPUTS).out
    (tmp_path / "in").write_bytes(pack(INPUTS.read_bytes())[:-20])
    assert run(*argv, "--input_file", tmp_path / "in").error().endswith("in: the compressed file is cut off")


def _agree(text, lines):
    found = text.split("\n")
    assert found.pop() == "" and len(found) == len(lines)
    assert [(i, a, b) for i, (a, b) in enumerate(zip(found, lines, strict=True)) if b not in (None, a)] == []


def test_defaults_are_the_originals():
    args = vars(decode.build_parser().parse_args(["--model_path", "m", "--input_file", "i"]))
    assert {name: args[name] for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS


def test_traces_and_output_beside_the_original(run, tmp_path):
    outcome = run(*BEAM, "--output_file", tmp_path / "out", "--need_score_traces")
    assert outcome.status == 0, outcome
    assert (tmp_path / "out").read_bytes().decode() == T_BEAM4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.trace.pickle"]
    ours = list(safe_pickle.load_traces(tmp_path / "out.trace.pickle"))
    theirs = list(safe_pickle.load_traces(GOLDENS / "trace" / "t_beam4.trace.pickle"))
    shapes = [[(len(trace[key]), len(trace[key][0])) for key in trace] for trace in ours]
    assert shapes == [[(len(trace[key]), len(trace[key][0])) for key in trace] for trace in theirs]
    with open(tmp_path / "out.trace.pickle", "rb") as stream:
        assert pickle.load(stream) == {"version": 0.0, "num_samples": 26}


@pytest.mark.parametrize(
    ("group", "wanted", "flags"),
    [
        ("beam1_T8_mask", {}, []),
        ("beam2_T8_posshift", {"length_penalty": 0.9, "min_len": 5}, ["--pos_shift"]),
        ("beam5_T24_mask", {"ngram_size": 3, "forbid_ignore_word": "a|[x_sep]"}, ["--forbid_duplicate_ngrams"]),
        ("type0", {}, ["--config_path", TINY / "config_type0.json"]),
    ],
)
def test_flags_reach_the_search(group, wanted, flags, run, tmp_path):
    cases = json.loads((GOLDENS / "decode" / f"{group}.json").read_text(encoding="utf8"))["cases"]
    case = next(c for c in cases if all(c["args"].get(name) == value for name, value in wanted.items()))
    given = {key: value for key, value in case["args"].items() if key not in ("mode", "model_type", "config_path")}
    argv = [text for name, value in given.items() if value is not True for text in (f"--{name}", str(value))]
    argv += [f"--{name}" for name, value in given.items() if value is True and f"--{name}" not in flags]
    model = ["--model_path", TINY, *TOKENIZER]
    outcome = run(*model, *argv, *flags, "--input_file", INPUTS, "--output_file", tmp_path / "out")
    assert outcome.status == 0, outcome
    _agree((tmp_path / "out").read_text(encoding="utf8"), _case(group, **wanted))


def test_flags_without_effect_change_nothing(run):
    odd = [*WITHOUT_EFFECT, "--seed", "-1", "--mode", "l2r"]
    assert run(*BEAM, *odd, "--output_file", "-").out == T_BEAM4


def test_batch_size_and_switches_change_no_answer(run):
    for flags in (["--batch_size", "1"], ["--batch_size", "100"], ["--threads", "1"]):
        assert run(*BEAM, *flags, "--output_file", "-").out == T_BEAM4


def test_standard_input_and_output(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(INPUTS.read_bytes())))
    outcome = run(*MODEL, "--beam_size", "4", "--input_file", "-", "--output_file", "-")
    assert outcome.status == 0
    assert outcome.out == T_BEAM4
    assert outcome.err.startswith("note: standard input mixes ")


@pytest.mark.parametrize("flag", ["--need_score_traces", "--resume"])
def test_standard_output_has_nothing_beside_it(flag, run):
    assert flag in run(*BEAM, "--output_file", "-", flag).error()


def test_a_device_is_written_in_place(run):
    assert run(*BEAM, "--output_file", "/dev/stdout").out == T_BEAM4


def test_a_link_stays_a_link(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real" / "out")
    assert run(*BEAM, "--output_file", tmp_path / "out").status == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "out").read_text(encoding="utf8") == T_BEAM4


def test_every_checkpoint_that_matches(run, tmp_path):
    """Without --output_file every folder gets ``folder.split`` beside it; files are passed over."""
    for step in (200, 1000, 30):
        (tmp_path / f"ckpt-{step}").mkdir()
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            shutil.copy(TINY / name, tmp_path / f"ckpt-{step}" / name)
    (tmp_path / "ckpt-9.log").write_text("a file\n")
    argv = [*TOKENIZER, *LENGTHS, "--input_file", INPUTS, "--beam_size", "4", "--split", "dev"]
    outcome = run("--model_path", tmp_path / "ckpt-*", *argv)
    assert outcome.status == 0, outcome
    written = [line.rsplit("/", 1)[1] for line in outcome.err.splitlines() if line.startswith("done: ")]
    assert written == ["ckpt-30.dev", "ckpt-200.dev", "ckpt-1000.dev"]
    for name in written:
        assert (tmp_path / name).read_text(encoding="utf8") == T_BEAM4
    assert len(list(tmp_path.iterdir())) == 7
    assert "matches 3 folders" in run("--model_path", tmp_path / "ckpt-*", *argv, "--output_file", "x").error()


def test_a_weights_file_with_its_configuration(run, tmp_path):
    argv = ["--model_path", TINY / "pytorch_model.bin", "--config_path", TINY / "config.json", *TOKENIZER, *LENGTHS]
    assert run(*argv, "--beam_size", "4", "--input_file", INPUTS, "--output_file", "-").out == T_BEAM4


def test_the_checkpoints_own_tokenizer(run, tmp_path):
    model = Model.from_pretrained(TINY, tokenizer_name=str(TINY / "vocab.txt"), do_lower_case=True)
    model.save_pretrained(tmp_path / "saved")
    argv = ["--model_path", tmp_path / "saved", *LENGTHS, "--beam_size", "4", "--input_file", INPUTS]
    assert run(*argv, "--output_file", "-").out == T_BEAM4


def test_subset(run):
    outcome = run(*BEAM, "--subset", "5", "--output_file", "-")
    assert outcome.out == "".join(T_BEAM4.splitlines(keepends=True)[:5])


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "int8"], ["--fp16"]])
def test_formats(flags, run, tmp_path):
    """Rounded weights give the answers that the library gives in the same format."""
    outcome = run(*BEAM, *flags, "--output_file", tmp_path / "out")
    assert outcome.status == 0, outcome
    dtype = "bf16" if flags == ["--fp16"] else flags[1]
    assert ("bf16" in outcome.err) == (flags == ["--fp16"])
    model = Model.from_pretrained(TINY, tokenizer_name=str(TINY / "vocab.txt"), do_lower_case=True)
    sources = [json.loads(line)["src"] for line in INPUTS.read_text(encoding="utf8").splitlines()]
    results = model.generate(sources, dtype=dtype, beam_size=4, max_seq_length=64, max_tgt_length=24, batch_size=7)
    assert (tmp_path / "out").read_text(encoding="utf8") == "".join(result.text + "\n" for result in results)


def test_an_explicit_format_wins_over_fp16(run):
    assert run(*BEAM, "--fp16", "--dtype", "fp32", "--output_file", "-").out == T_BEAM4


def test_progress(run):
    outcome = run(*BEAM, "--output_file", "-", "--progress")
    last = outcome.err.split("\r")[-1]
    assert "26/26" in last and "sentences/s" in last
    assert "sentences/s" not in run(*BEAM, "--output_file", "-").err


def test_what_was_cut_and_what_is_unknown_is_reported(run, tmp_path):
    long = " ".join(["gota"] * 50)
    inputs = write_inputs(tmp_path / "in", ["gota ka", long, ["gota", "notthere"], long, ["nor", "this", "ka"]])
    outcome = run(*MODEL, "--input_file", inputs, "--output_file", tmp_path / "out")
    assert "2 of 5 sources are longer than 38 tokens and were cut (24 tokens; first in line 2)" in outcome.err
    assert "2 of 5 sources hold tokens that the vocabulary does not know (3 tokens; first in line 3)" in outcome.err


def test_a_cut_source_decodes_as_its_beginning(run, tmp_path):
    words = json.loads(INPUTS.read_text(encoding="utf8").splitlines()[11])["src"]
    inputs = write_inputs(tmp_path / "in", [words, words[:38], words[:39]])
    lines = run(*MODEL, "--beam_size", "2", "--input_file", inputs, "--output_file", "-").out.splitlines()
    assert len(words) > 39 and len(set(lines)) == 1


def test_an_empty_source_still_generates(run, tmp_path):
    expected = T_BEAM4.splitlines()[16]
    assert json.loads(INPUTS.read_text(encoding="utf8").splitlines()[16])["src"] == []
    inputs = write_inputs(tmp_path / "in", ["", [], "  "])
    outcome = run(*MODEL, "--beam_size", "4", "--input_file", inputs, "--output_file", "-")
    assert outcome.out.splitlines() == [expected] * 3


def test_lines_in_any_form(run, tmp_path):
    """A byte-order mark, Windows line ends, blank lines at the end, other keys."""
    text = '\ufeff{"src": "gota ka", "tgt": 5}\r\n{"id": 7, "src": "gota ka"}\r\n\r\n  \n'
    (tmp_path / "in").write_text(text, encoding="utf8", newline="")
    lines = run(*MODEL, "--input_file", tmp_path / "in", "--output_file", "-").out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]


def test_mixed_kinds_are_said(run, tmp_path):
    inputs = write_inputs(tmp_path / "in", ["gota", "ka", ["gota"], "ka"])
    outcome = run(*MODEL, "--input_file", inputs, "--output_file", "-")
    assert "texts (first in line 1) and lists of tokens (first in line 3)" in outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == lines[2] and lines[1] == lines[3]
    assert "mixes" not in run(*MODEL, "--input_file", write_inputs(inputs, ["a", "b"]), "--output_file", "-").err


def test_half_a_surrogate_pair_is_dropped(run, tmp_path):
    (tmp_path / "in").write_text('{"src": "go\\ud83dta"}\n{"src": "gota"}\n')
    lines = run(*MODEL, "--input_file", tmp_path / "in", "--output_file", "-").out.splitlines()
    assert lines[0] == lines[1]


def test_a_line_break_in_an_answer(run, tmp_path, monkeypatch):
    from minilm_fast.tokenization import Tokenizer

    monkeypatch.setattr(Tokenizer, "convert_ids_to_tokens", lambda self, ids: ["a\nb"])
    inputs = write_inputs(tmp_path / "in", ["gota"])
    assert run(*MODEL, "--input_file", inputs, "--output_file", "-").out == "a [X_SEP] b\n"


def test_options_of_the_library_and_of_the_command_agree():
    args = decode.build_parser().parse_args(["--model_path", "m", "--input_file", "i"])
    assert decode.search_options(args) == SearchOptions()


def test_traces_are_padded_as_with_the_originals_default(run, tmp_path):
    """Without --batch_size more sentences are decoded side by side than the original's 4, and no file shows it."""
    inputs = write_inputs(tmp_path / "in", [["gota"] * length for length in (1, 9, 3, 7, 5, 2)])
    flags = ["--max_seq_length", "64", "--max_tgt_length", "8", "--beam_size", "2", "--need_score_traces"]
    argv = ["--model_path", TINY, *TOKENIZER, *flags, "--input_file", inputs, "--output_file", tmp_path / "out"]
    assert run(*argv).status == 0
    frames = [len(trace["scores"]) for trace in safe_pickle.load_traces(tmp_path / "out.trace.pickle")]
    # Batches of 9, 7, 5, 3 and of 2, 1 tokens; two special tokens and the target are added.
    assert frames == [2 + 2 + 8, 9 + 2 + 8, 9 + 2 + 8, 9 + 2 + 8, 9 + 2 + 8, 2 + 2 + 8]

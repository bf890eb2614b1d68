"""Bad input to decoding: one clear line that names file, line or flag; a status that is not 0; nothing half-written."""

import json
import os
import pickle
import sys

import pytest
import torch

import minilm_fast
from minilm_fast import decode
from minilm_fast.decoding.inputs import read_sources
from minilm_fast.errors import UserError
from tests.command import BEAM, INPUTS, LENGTHS, MODEL, TINY, TOKENIZER, Runner, only_error, spawn, write_inputs


@pytest.fixture
def run(capfdbinary):
    runner = Runner(capfdbinary)
    return lambda *argv: runner(decode.main, *argv)


@pytest.fixture
def fails(run, tmp_path):
    """Runs a command that must fail, and checks that it leaves nothing behind; returns its line."""
    folder = tmp_path / "results"
    folder.mkdir()

    def check(*argv):
        line = run(*argv, "--output_file", folder / "out").error()
        assert list(folder.iterdir()) == []
        return line

    return check


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder to be spoiled."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def _decode(checkpoint):
    return ["--model_path", checkpoint, *TOKENIZER, *LENGTHS, "--input_file", INPUTS]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no weights"),
        (b"", "empty"),
        ("cut", "cut off"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"hello world, this is text", "not a weights file"),
    ],
    ids=["missing", "empty", "cut-off", "html", "text"],
)
def test_weights(content, expected, fails, checkpoint):
    weights = checkpoint / "pytorch_model.bin"
    data = weights.read_bytes()
    weights.unlink()
    if content is not None:
        weights.write_bytes(data[: len(data) // 2] if content == "cut" else content)
    line = fails(*_decode(checkpoint))
    assert expected in line and str(checkpoint) in line


def test_malicious_weights_run_nothing(fails, checkpoint, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"bert.embeddings.word_embeddings.weight": Attack()}, checkpoint / "pytorch_model.bin")
    line = fails(*_decode(checkpoint))
    assert "refused" in line and "pytorch_model.bin" in line
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    fails(*_decode(checkpoint))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"intermediate_size": 48}, "shape"),
        ({"num_hidden_layers": 4}, "layers"),
        ({"hidden_size": "large"}, "hidden_size"),
    ],
    ids=["shape", "layers", "type"],
)
def test_configuration_and_weights_disagree(changes, expected, fails, checkpoint):
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, **changes}))
    line = fails(*_decode(checkpoint))
    assert expected in line and str(checkpoint) in line


def test_an_encoder_without_a_head(fails, checkpoint):
    weights = checkpoint / "pytorch_model.bin"
    state = {k: v for k, v in torch.load(weights, weights_only=True).items() if not k.startswith("cls.")}
    torch.save(state, weights)
    line = fails(*_decode(checkpoint))
    assert str(weights) in line and "an encoder without a language-model head cannot decode" in line


def test_no_configuration(fails, checkpoint):
    (checkpoint / "config.json").unlink()
    assert "configuration" in fails(*_decode(checkpoint))


def test_a_vocabulary_of_another_model(fails, tmp_path):
    tokens = (TINY / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, "more", "and", "more"]) + "\n")
    line = fails(*_decode(TINY), "--tokenizer_name", tmp_path / "vocab.txt")
    assert "vocab.txt" in line and "403" in line and "400" in line


def test_no_vocabulary(fails, tmp_path, checkpoint):
    assert "nowhere.txt" in fails(*_decode(TINY), "--tokenizer_name", tmp_path / "nowhere.txt")
    argv = ["--model_path", checkpoint, *LENGTHS, "--input_file", INPUTS]
    assert "--tokenizer_name" in fails(*argv)


@pytest.mark.parametrize("name", ["nowhere/at/all", "nothing-*", "./nothing.bin"])
def test_no_checkpoint(name, fails, tmp_path):
    assert "--model_path" in fails(*_decode(tmp_path / name))


def test_no_checkpoint_and_no_output_file(run, tmp_path):
    assert "--model_path" in run(*_decode(tmp_path / "nowhere")).error()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"src": "gota"', "broken JSON"),
        ("a line of plain text", "broken JSON"),
        ('{"src": "gota"} {"src": "ka"}', "broken JSON"),
        ("[" * 100000, "broken JSON"),
        ('{"src": ' + "9" * 5000 + "}", "broken JSON"),
        ('{"tgt": "gota"}', "no 'src'"),
        ('["gota", "ka"]', "not a JSON object"),
        ('"gota"', "not a JSON object"),
        ('{"src": 5}', "neither a text nor a list of tokens"),
        ('{"src": null}', "neither a text nor a list of tokens"),
        ('{"src": ["gota", 5]}', "neither a text nor a list of tokens"),
        ('{"src": [["gota"], ["ka"]]}', "neither a text nor a list of tokens"),
        ("", "blank line"),
        (b'{"src": "caf\xe9"}', "not UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("number", [1, 3])
def test_lines(number, line, expected, fails, tmp_path):
    lines = [json.dumps({"src": "gota ka"}).encode()] * 4
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    if number == 1 and len(line) < 100:
        message = fails(*MODEL, "--input_file", tmp_path / "in.jsonl")
    else:
        # The command shows the reader's errors; that it does need not be shown for each.
        with pytest.raises(UserError) as caught:
            read_sources(str(tmp_path / "in.jsonl"))
        message = str(caught.value)
    assert f"in.jsonl:{number}: " in message and expected in message and "\n" not in message


def test_a_line_beyond_the_subset_is_not_looked_at(run, tmp_path):
    (tmp_path / "in").write_text('{"src": "gota"}\nbroken\n')
    assert run(*MODEL, "--input_file", tmp_path / "in", "--subset", "1", "--output_file", "-").status == 0


@pytest.mark.parametrize("content", ["", "\n", " \n\t\r\n"], ids=repr)
def test_an_empty_file(content, fails, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    assert f"{tmp_path / 'in.jsonl'} is empty" in fails(*MODEL, "--input_file", tmp_path / "in.jsonl")


def test_no_input(fails, tmp_path):
    assert "nowhere.jsonl" in fails(*MODEL, "--input_file", tmp_path / "nowhere.jsonl")
    assert str(tmp_path) in fails(*MODEL, "--input_file", tmp_path)


def test_empty_standard_input(run, monkeypatch):
    with open(os.devnull, encoding="utf8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert "standard input is empty" in run(*MODEL, "--input_file", "-", "--output_file", "-").error()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_tgt_length", "62"], "--max_tgt_length"),
        (["--max_tgt_length", "0"], "--max_tgt_length"),
        (["--need_score_traces"], "--need_score_traces"),
        (["--beam_size", "0"], "--beam_size"),
        (["--beam_size", "401"], "--beam_size"),
        (["--batch_size", "0"], "--batch_size"),
        (["--ngram_size", "0"], "--ngram_size"),
        (["--min_len", "-1"], "--min_len"),
        (["--length_penalty", "nan"], "--length_penalty"),
        (["--max_seq_length", "512", "--max_tgt_length", "90"], "--max_seq_length"),
        (["--model_type", "gpt"], "gpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags(flags, expected, fails):
    assert expected in fails(*MODEL, "--input_file", INPUTS, *flags)


def test_a_backend_that_cannot_run(fails):
    with minilm_fast.backend("triton"):
        assert "backend 'triton' cannot run" in fails(*MODEL, "--input_file", INPUTS)


def test_a_beam_as_large_as_the_vocabulary(run, tmp_path):
    inputs = write_inputs(tmp_path / "in", ["gota"])
    flags = ["--beam_size", "400", "--max_tgt_length", "3"]
    assert run(*MODEL, *flags, "--input_file", inputs, "--output_file", "-").out.count("\n") == 1


def test_tokens_that_the_vocabulary_lacks_are_unknown(run, tmp_path):
    inputs = write_inputs(tmp_path / "in", [["gota", "no such token", "\ud800"], ["gota", "[UNK]", "[UNK]"]])
    outcome = run(*MODEL, "--input_file", inputs, "--output_file", "-")
    assert outcome.status == 0 and "(4 tokens; first in line 1)" in outcome.err
    assert len(set(outcome.out.splitlines())) == 1


def test_a_missing_output_folder(run, tmp_path):
    line = run(*BEAM, "--output_file", tmp_path / "nowhere" / "out").error()
    assert str(tmp_path / "nowhere") in line


def test_an_output_that_is_a_folder(run, tmp_path):
    assert "is a folder" in run(*BEAM, "--output_file", tmp_path).error()


def test_an_output_folder_without_permission(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != str(tmp_path))
    assert "not writable" in run(*BEAM, "--output_file", tmp_path / "out").error()
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_takes_no_files(run):
    """What cannot be told from the permissions is found when the journal is made, before the first sentence."""
    assert "/proc/out" in run(*BEAM, "--output_file", "/proc/out").error()


def test_the_output_is_the_input(run, tmp_path):
    inputs = write_inputs(tmp_path / "in", ["gota"])
    assert "is the input file" in run(*MODEL, "--input_file", inputs, "--output_file", inputs).error()
    assert json.loads(inputs.read_text()) == {"src": "gota"}


def test_a_full_device(run):
    line = run(*BEAM, "--output_file", "/dev/full").error()
    assert "/dev/full" in line and "No space left on device" in line


def test_standard_output_is_full_or_closed(tmp_path):
    """Also at the end of the process, when what is left in its buffers is written."""
    inputs = write_inputs(tmp_path / "in", ["gota"])
    argv = [*MODEL, "--input_file", inputs, "--output_file", "-"]
    full = spawn("decode", *argv, script="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    closed = spawn("decode", *argv)
    closed.stdout.close()
    for process, reason in ((full, "No space left on device"), (closed, "Broken pipe")):
        err = process.stderr.read().decode()
        assert process.wait() == 2
        assert f"standard output: cannot be written: {reason}" in only_error(err)
        process.stderr.close()


@pytest.fixture(scope="module")
def model():
    return minilm_fast.Model.from_pretrained(TINY, tokenizer_name=TINY / "vocab.txt", do_lower_case=True)


def test_one_text_from_python(model):
    """Not its characters one by one."""
    options = {"max_seq_length": 32, "max_tgt_length": 8}
    alone = model.generate("segu gota", **options)
    (first, second) = model.generate((text for text in ("segu gota", "zi")), **options)
    assert alone == first and first.text != second.text
    with pytest.raises(UserError, match="inputs must be sources, got one string"):
        next(model.generate_stream("segu gota", **options))


@pytest.mark.parametrize("source", [None, 5, b"gota", ["gota", 5], {"src": "gota"}], ids=str)
def test_sources_of_another_kind_from_python(model, source):
    with pytest.raises(UserError, match="source 1 must be a string or a list of tokens, got"):
        model.generate(["gota", source], max_seq_length=32, max_tgt_length=8)

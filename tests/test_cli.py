"""What all command lines share: quick help, one line for an error, exit statuses, subcommands."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minilm_fast import __version__, cli, decode, gen_seq_from_trace
from minilm_fast.errors import UserError
from tests.command import Runner, only_error, spawn

HEAVY = ("torch", "transformers", "tokenizers", "sentencepiece", "huggingface_hub", "tqdm", "numpy", "safetensors")
MODULES = [module for module, _ in cli.COMMANDS.values()]


@pytest.fixture
def run(capfdbinary):
    return Runner(capfdbinary)


@pytest.mark.parametrize("module", MODULES)
def test_help_loads_nothing_heavy(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage: ")
    loaded = {line.rsplit("|", 1)[1].strip() for line in found.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_commands_log_under_the_packages_name():
    """Under ``python -m`` the name of the module is ``__main__``, whose messages the handler would not get."""
    package = Path(cli.__file__).parent
    texts = [path.read_text(encoding="utf8") for path in package.rglob("*.py")]
    commands = [text for text in texts if "__main__" in text and "getLogger(" in text]
    assert len(commands) >= 5 and not any("getLogger(__name__)" in text for text in commands)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_subcommands(command, run):
    outcome = run(cli.main, command, "--help")
    assert outcome.status == 0 and outcome.out.startswith("usage: ")


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_is_described_with_its_default(module):
    parser = importlib.import_module(module).build_parser()
    text = " ".join(parser.format_help().split())
    assert [action.option_strings for action in parser._actions if not action.help] == []
    for action in parser._actions:
        if (
            isinstance(action.default, (int, float))
            and action.default not in (0, -1)
            and "no effect" not in action.help
        ):
            assert f"{action.default}" in text, action.option_strings
    assert "``" not in text


def test_script_lists_its_commands(run):
    outcome = run(cli.main, "--help")
    assert outcome.status == 0
    assert all(command in outcome.out for command in cli.COMMANDS)
    assert run(cli.main, "--version").out == f"minilm_fast {__version__}\n"


@pytest.mark.parametrize(
    ("main", "argv", "expected"),
    [
        (cli.main, [], "COMMAND"),
        (cli.main, ["destroy"], "destroy"),
        (decode.main, ["--model_path", "x"], "--input_file"),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--beam_size", "many"], "--beam_size"),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--mode", "both"], "--mode"),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--dtype", "fp8"], "--dtype"),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--threads", "0"], "--threads"),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--threads", str(10**12)], "--threads"),
        (
            decode.main,
            ["--model_path", "x", "--input_file", "y", "--output_file", "z" * 300],
            "zzz: File name too long",
        ),
        (decode.main, ["--model_path", "x", "--input_file", "y", "--unknown"], "--unknown"),
        (gen_seq_from_trace.main, ["--input", "x"], "--model_type"),
    ],
)
def test_wrong_flags_are_one_line(main, argv, expected, run):
    assert expected in run(main, *argv).error()


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("x.bin: cut off\nsomewhere"), 2, "error: x.bin: cut off somewhere; try again\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; try again\n"),
        (MemoryError(), 2, "error: not enough memory; a lower --batch_size needs less; try again\n"),
        (OSError(errno.EACCES, "Permission denied", "in/x.bin"), 2, "error: in/x.bin: Permission denied; try again\n"),
    ],
)
def test_exit_statuses(error, status, line, capsys):
    assert cli.guarded(lambda: _raise(error), lambda: "; try again") == status
    assert capsys.readouterr().err == line


def test_a_request_to_end(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.guarded(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EBADF, "Bad file descriptor")], ids=repr)
def test_errors_of_the_program_are_not_hidden(error):
    with pytest.raises(type(error)) as caught:
        cli.guarded(lambda: _raise(error))
    assert caught.value is error


def test_warnings_are_one_line(capsys):
    import warnings

    assert cli.guarded(lambda: warnings.warn("positions\nare repeated", stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: positions are repeated\n"


def test_processes_of_a_group_are_told_apart(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert cli.guarded(lambda: _raise(UserError("no"))) == 2
    assert capsys.readouterr().err == "error: process 3: no\n"


@pytest.mark.parametrize(("place", "reason"), [("/dev/full", "No space left on device"), (None, "Broken pipe")])
def test_a_table_that_cannot_be_printed(place, reason, tmp_path):
    answer = {"text": "y", "answer_start": 2}
    question = {"id": "1", "question": "what", "answers": [answer]}
    (tmp_path / "data.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "x y", "qas": [question]}]}]}))
    (tmp_path / "answers.json").write_text('{"1": "y"}')
    argv = ["--data_file", tmp_path / "data.json", "--prediction_file", tmp_path / "answers.json"]
    script = f"import os; os.dup2(os.open({place!r}, os.O_WRONLY), 1)" if place else ""
    process = spawn("evaluate_qa", *argv, script=script)
    if not place:
        process.stdout.close()
        process.stdout = None
    _, err = process.communicate(timeout=60)
    assert only_error(err.decode()) == f"error: standard output: cannot be written: {reason}"
    assert process.returncode == 2

"""The README's commands and its Python, run as they stand (with paths filled in)."""

import re
import shlex
from pathlib import Path

import pytest

from minilm_fast import decode, run_seq2seq

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "question-generation"
README = (ROOT / "README.md").read_text(encoding="utf8")


def _command(module):
    """Arguments of the first indented command of a module, lines joined."""
    found = re.search(rf"^    python -m minilm_fast\.{module} \\\n((?:      .*\n)+)", README, re.MULTILINE)
    assert found, f"the README shows no command for {module}"
    return shlex.split(found.group(1).replace("\\\n", " "))


def _replace(argv, **values):
    for flag, value in values.items():
        argv[argv.index(f"--{flag}") + 1] = str(value)
    return argv


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "test.jsonl"
    lines = (EXAMPLE / "passages.jsonl").read_text(encoding="utf8").split("\n")[:2]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8")
    return path


def test_decode_command(tmp_path, passages):
    output = tmp_path / "questions"
    argv = _replace(_command("decode"), model_path=EXAMPLE, tokenizer_name=EXAMPLE / "vocab.txt", input_file=passages)
    assert decode.main([*argv, "--output_file", str(output)]) == 0
    assert [bool(line) for line in output.read_text(encoding="utf8").split("\n")] == [True, True, False]


def test_training_command_parses():
    args = run_seq2seq.build_parser().parse_args(_command("run_seq2seq"))
    assert args.num_training_steps == 30000


def test_python(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    text, score = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert text.endswith("?") and float(score) < 0


def test_demo_prints_every_passage(capsys, monkeypatch):
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["demo.py", "--limit", "2"])
    runpy.run_path(str(EXAMPLE / "demo.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("question  ") == 2 and "2 passages, beam 5" in out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert target.startswith("http") or (ROOT / target).exists()


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE)

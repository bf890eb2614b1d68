"""The commands and the Python of the pages on tasks and their evaluation."""

import json
import re
import shlex
from pathlib import Path

import pytest

from minilm_fast import decode, distill, evaluate, run_glue, run_seq2seq, run_xnli

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "docs/evaluation.md", "docs/reproducing.md", "docs/understanding.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf8") for name in NAMES}
PROGRAMS = (decode, distill, evaluate, run_glue, run_seq2seq, run_xnli)
PARSERS = {program.__name__.split(".")[-1]: program.build_parser for program in PROGRAMS}
COMMAND = re.compile(r"^    (?:torchrun --\S+|python) -m minilm_fast\.(\w+) ((?:.*\\\n)*.*)$", re.MULTILINE)


def commands():
    for page, text in PAGES.items():
        for module, arguments in COMMAND.findall(text):
            yield pytest.param(module, arguments, id=f"{page}-{module}")


@pytest.mark.parametrize(("module", "arguments"), list(commands()))
def test_commands_parse(module, arguments):
    argv = shlex.split(arguments.replace("\\\n", " "))
    args = PARSERS[module]().parse_args(argv)
    assert all(str(value) != "\\" for value in vars(args).values())


def test_every_task_has_its_three_commands():
    found = [module for module, _ in COMMAND.findall(PAGES["docs/reproducing.md"])]
    assert found == ["run_seq2seq", "decode", "evaluate"] * 3 + ["evaluate"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if not link.startswith("http")]
    assert links and all((folder / link).exists() for link in links)


def _python(page):
    return re.search(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL).group(1)


def test_python_of_the_metrics():
    exec(compile(_python("docs/evaluation.md"), "evaluation.md", "exec"), {})


def _squad(name, articles):
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs]}
        for title, paragraphs in articles
    ]
    Path(name).write_text(json.dumps({"data": data}), encoding="utf8")


def _qa(question, number):
    return {"question": question, "id": number, "answers": [{"text": f"answer {number}"}]}


def test_preparing_question_generation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _squad(
        "train-v1.1.json",
        [
            (
                "A",
                [
                    ("It is (so) here.", [_qa(" Why is it (so)? ", "1"), _qa("Who?", "2")]),
                    ("He left.", [_qa("Who?", "3")]),
                ],
            ),
            ("B", [("To train with.", [_qa("What?", "4")])]),
        ],
    )
    _squad("dev-v1.1.json", [("C", [("Developed.", [_qa("When?", "5")])])])
    Path("src-test.txt").write_text("he left .\nit is -lrb- so -rrb- here .\nit is -lrb- so -rrb- here .\n")
    Path("tgt-test.txt").write_text("who ?\nwho ?\nwhy is it -lrb- so -rrb- ?\n")
    Path("src-dev.txt").write_text("developed .\n")
    Path("tgt-dev.txt").write_text("when ?\n")
    exec(compile(_python("docs/reproducing.md"), "reproducing.md", "exec"), {})
    assert capsys.readouterr().out == "3 test.jsonl\n1 dev.jsonl\n1 train.jsonl\n"
    test = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    assert [record["id"] for record in test] == ["3", "2", "1"]
    assert test[2] == {
        "src": "It is (so) here. [SEP] answer 1",
        "tgt": "Why is it (so)?",
        "id": "1",
        "title": "A",
        "ref_tok": "why is it -lrb- so -rrb- ?",
        "sent_tok": "it is -lrb- so -rrb- here .",
    }
    assert json.loads(Path("train.jsonl").read_text())["id"] == "4"

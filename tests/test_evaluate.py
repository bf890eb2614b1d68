"""``minilm_fast.evaluate``: what it prints and writes, and its errors."""

import json
from pathlib import Path

import pytest

from minilm_fast import evaluate, metrics
from tests.command import Runner

GOLDENS = Path(__file__).resolve().parent / "goldens" / "metrics"
EXPECTED = json.loads((GOLDENS / "questions_scores.json").read_text())
GOLD_TEXT = "the cat sat on the mat .\na dog barked at night .\nall is well ( today ) .\n"


@pytest.fixture
def run(capfdbinary):
    runner = Runner(capfdbinary)
    return lambda *argv: runner(evaluate.main, *argv)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("gold.txt", GOLD_TEXT)
    write("ckpt-500.dev", "the cat sat .\na dog .\nall is well ( today ) .\n")
    write("ckpt-1000.dev", "the cat sat on a mat .\na dog barked .\nall is well ( now ) .\n")
    return tmp_path


def write(name, text):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def json_lines(name, records):
    return write(name, "".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def questions(folder):
    records = [json.loads(line) for line in (GOLDENS / "questions.jsonl").read_text(encoding="utf8").splitlines()]
    write("pred", "".join(record["pred"] + "\n" for record in records))
    json_lines("gold.jsonl", records)
    return records


XSUM = ("--task", "xsum", "--gold", "gold.txt")


def test_files_side_by_side(run, folder):
    outcome = run(*XSUM, "--pred", "ckpt-*.dev", "--json", "scores.json")
    assert outcome.status == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0] == "xsum: 3 examples of gold.txt"
    assert lines[1].split() == ["file", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert lines[2].startswith("ckpt-500.dev") and not lines[2].endswith("best by ROUGE-2")
    assert lines[3].startswith("ckpt-1000.dev") and lines[3].endswith("best by ROUGE-2")
    report = json.loads(Path("scores.json").read_text())
    assert report["best"] == "ckpt-1000.dev" and report["examples"] == 3
    for line, scores in zip(lines[2:4], report["files"], strict=True):
        assert line.split()[1:4] == [f"{scores['scores'][name]:.2f}" for name in ("rouge1", "rouge2", "rougeL")]
    # "(" is -LRB- in predictions only: the gold file is taken as tokenised already.
    gold = [[line] for line in GOLD_TEXT.splitlines()]
    predictions = ["the cat sat .", "a dog .", "all is well -LRB- today -RRB- ."]
    expected = metrics.rouge(predictions, gold)
    assert report["files"][0]["scores"] == {name: score.f for name, score in expected.items()}
    assert report["files"][0]["recall"]["rouge1"] == expected["rouge1"].recall


def test_json_on_standard_output(run, folder):
    report = json.loads(run(*XSUM, "--pred", "ckpt-500.dev", "--json", "-").out)
    assert report["task"] == "xsum" and report["files"][0]["file"] == "ckpt-500.dev"


def test_irregular_words(run, folder):
    Path("lists").mkdir()
    for part, text in {
        "noun": "mice mouse\n",
        "verb": "held hold cling\n",
        "adj": "best good\n",
        "adv": "",
    }.items():
        write(f"lists/{part}.exc", text or "best well\n")
    write("gold.txt", "they hold it well\n")
    write("pred", "they held it best\n")
    argv = (*XSUM, "--pred", "pred", "--json", "-")
    report = json.loads(run(*argv, "--wordnet_exceptions", "lists").out)
    assert report["files"][0]["scores"]["rouge2"] == 100 and report["method"]["exceptions"] == "lists"
    plain = json.loads(run(*argv).out)
    assert plain["files"][0]["scores"]["rouge1"] == 50 and plain["method"]["exceptions"].startswith("none")
    write("lists/adj.exc", "best good\nlonely\n")
    assert "lists/adj.exc:2: not a word and its base form" in run(*argv, "--wordnet_exceptions", "lists").error()
    assert "cannot read no/noun.exc" in run(*argv, "--wordnet_exceptions", "no").error()


def test_confidence_interval(run, folder):
    outcome = run(*XSUM, "--pred", "ckpt-500.dev", "--bootstrap", "200", "--json", "scores.json")
    scores = json.loads(Path("scores.json").read_text())["files"][0]
    low, high = scores["interval"]["rouge1"]
    assert low < scores["scores"]["rouge1"] < high
    assert f"{scores['scores']['rouge1']:.2f} [{low:.2f}, {high:.2f}]" in outcome.out
    assert "95 %, bootstrap of 200 resamples" in outcome.out


def test_cnndm_sentences_and_truncation(run, folder):
    write("gold.txt", "one two three four five . <S_SEP> six seven eight nine ten .\n")
    write("pred", "six seven eight nine ten . [X_SEP] one two three four five .\n")
    argv = ("--task", "cnndm", "--gold", "gold.txt", "--pred", "pred", "--json", "-")
    whole = json.loads(run(*argv).out)
    assert whole["files"][0]["scores"]["rougeL"] == pytest.approx(100)
    assert whole["method"]["predictions"] == "cut to 160 words, sentences repeated by more than 0.7 dropped"
    cut = json.loads(run(*argv, "--trunc_len", "6", "--duplicate_rate", "0").out)
    assert cut["files"][0]["recall"]["rouge1"] == 50 and cut["files"][0]["precision"]["rouge1"] == 100
    assert cut["method"]["predictions"] == "cut to 6 words"


def test_raw_references_and_several_of_them(run, folder):
    json_lines("gold.jsonl", [{"tgt": "x", "refs": ["nothing", "all is well (today)"]}])
    write("pred", "all is well ( today )\n")
    outcome = run("--task", "xsum", "--gold", "gold.jsonl", "--pred", "pred", "--json", "-")
    report = json.loads(outcome.out)
    assert report["gold_field"] == "refs" and report["files"][0]["scores"]["rouge2"] == 100
    assert report["method"]["references"] == "of several the one with the highest F counts"
    named = json.loads(
        run("--task", "xsum", "--gold", "gold.jsonl", "--pred", "pred", "--gold_field", "tgt", "--json", "-").out
    )
    assert named["gold_field"] == "tgt" and named["files"][0]["scores"]["rouge1"] == 0


@pytest.mark.parametrize("key", EXPECTED)
def test_questions_under_every_pooling(run, questions, key):
    argv = ("--task", "qg", "--gold", "gold.jsonl", "--pred", "pred", "--tokenization", "none", "--pool_key", key)
    outcome = run(*argv, "--json", "scores.json")
    report = json.loads(Path("scores.json").read_text())
    assert report["gold_field"] == "ref_tok"
    assert report["files"][0]["scores"] == pytest.approx(
        {name: EXPECTED[key][name] for name in ("bleu4", "rougeL")}, abs=1e-5
    )
    lines = outcome.out.splitlines()
    assert lines[2].split() == ["pred", f"{EXPECTED[key]['bleu4']:.2f}", f"{EXPECTED[key]['rougeL']:.2f}"]
    assert any(line.startswith("pooling") and f"{EXPECTED[key]['items']} items" in line for line in lines)
    assert any(line.startswith("tokens   none:") for line in lines) and "METEOR   left out" in lines


def test_questions_by_default(run, questions):
    report = json.loads(run("--task", "qg", "--gold", "gold.jsonl", "--pred", "pred", "--json", "-").out)
    assert report["method"]["pooling"].startswith("passage ('src')")
    assert report["method"]["tokens"].startswith("nqg:")
    argv = ("--task", "qg", "--gold", "gold.jsonl", "--pred", "pred", "--gold_field", "tgt", "--json", "-")
    assert json.loads(run(*argv).out)["method"]["tokens"].startswith("bert:")


def test_pool_file_for_plain_lines(run, questions):
    write("gold.txt", "".join(record["ref_tok"] + "\n" for record in questions))
    write("keys", "".join(record["sent_tok"].upper() + "\n" for record in questions))
    argv = ("--task", "qg", "--gold", "gold.txt", "--pred", "pred", "--tokenization", "none", "--json", "-")
    pooled = json.loads(run(*argv, "--pool_file", "keys").out)
    assert pooled["files"][0]["scores"]["bleu4"] == pytest.approx(EXPECTED["sentence"]["bleu4"], abs=1e-5)
    single = json.loads(run(*argv).out)
    assert single["files"][0]["scores"]["bleu4"] == pytest.approx(EXPECTED["none"]["bleu4"], abs=1e-5)


def test_empty_predictions_and_references(run, folder):
    write("gold.txt", "a b c\n\nd e f\n")
    write("pred", "\nwhatever\nd e f\n")
    outcome = run(*XSUM, "--pred", "pred", "--json", "-")
    report = json.loads(outcome.out)
    assert report["examples"] == 2 and report["left_out"] == 1
    assert report["files"][0]["scores"] == pytest.approx({"rouge1": 50, "rouge2": 50, "rougeL": 50})
    assert outcome.err == "note: pred: 1 of 3 predictions are empty and score 0\n"
    write("pred", "\n\n\n")
    assert "0.00" in run(*XSUM, "--pred", "pred").out
    assert "0.00" in run("--task", "qg", "--gold", "gold.txt", "--pred", "pred").out
    assert "1 more have no reference and are left out" in run(*XSUM, "--pred", "pred").out


def test_subset(run, folder):
    write("first", "the cat sat on the mat .\n")
    assert (
        run(*XSUM, "--pred", "first")
        .error()
        .endswith("first has 1 lines and gold.txt 3; --subset 1 compares the first 1")
    )
    assert "100.00" in run(*XSUM, "--pred", "first", "--subset", "1").out
    assert run(*XSUM, "--pred", "ckpt-500.dev", "--subset", "2").status == 0
    assert "--subset 4: gold.txt has 3 lines" in run(*XSUM, "--pred", "first", "--subset", "4").error()


def test_side_files_are_no_predictions(run, folder):
    for suffix in (".post", ".rouge", ".trace.pickle", ".partial.jsonl"):
        write("ckpt-500.dev" + suffix, "x")
    Path("ckpt-dir").mkdir()
    report = json.loads(run(*XSUM, "--pred", "ckpt-*", "ckpt-500.dev", "--json", "-").out)
    assert [scores["file"] for scores in report["files"]] == ["ckpt-500.dev", "ckpt-1000.dev"]


def test_best_checkpoint_is_kept_and_used(run, folder):
    best = ("--save_best", "--split", "dev")
    assert run(*XSUM, "--pred", "ckpt-500.dev", *best).err == "done: save_best.dev\n"
    assert run(*XSUM, "--pred", "ckpt-*.dev", *best).err == "done: save_best.dev\n"
    here, name, score = Path("save_best.dev").read_text().splitlines()
    assert (here, name) == (".", "ckpt-1000.dev") and 0 < float(score) < 1
    # A worse one does not replace it.
    assert run(*XSUM, "--pred", "ckpt-500.dev", *best).err == ""
    assert Path("save_best.dev").read_text().splitlines()[1] == "ckpt-1000.dev"
    for number in (500, 1000):
        write(f"ckpt-{number}.test", GOLD_TEXT)
    report = json.loads(run(*XSUM, "--pred", "ckpt-*.test", "--only_eval_best", "--json", "-").out)
    assert [scores["file"] for scores in report["files"]] == ["ckpt-1000.test"]
    write("save_best.dev", "nonsense")
    assert "save_best.dev: not three lines" in run(*XSUM, "--pred", "ckpt-*.test", "--only_eval_best").error()
    Path("save_best.dev").unlink()
    assert "--only_eval_best: no save_best.dev" in run(*XSUM, "--pred", "ckpt-*.test", "--only_eval_best").error()


def test_flags_of_the_original_without_effect(run, folder):
    plain = run(*XSUM, "--pred", "ckpt-500.dev").out
    assert run(*XSUM, "--pred", "ckpt-500.dev", "--perl", "--lazy_eval", "--processes", "2").out == plain


BAD_GOLD = {
    "empty": (b"", "gold.bad is empty"),
    "blank": (b"\n\n\n", "gold.bad: all references are empty"),
    "bytes": (b"a\nb\xff\nc\n", "gold.bad:2: not UTF-8 text"),
    "json": (b'{"tgt": "a"}\n{"tgt": \n{"tgt": "c"}\n', "gold.bad:2: broken JSON"),
    "json line between": (b'{"tgt": "a"}\n\n{"tgt": "c"}\n', "gold.bad:2: broken JSON"),
    "no object": (b'{"tgt": "a"}\n[1]\n3\n', "gold.bad:2: not a JSON object"),
    "no field": (b'{"src": "a"}\n{"tgt": "b"}\n{}\n', "gold.bad:1: no 'tgt' or 'refs'"),
    "lost field": (b'{"tgt": "a"}\n{"src": "b"}\n{}\n', "gold.bad:2: no 'tgt'"),
    "lost references": (b'{"refs": ["a"]}\n{"tgt": "b"}\n{}\n', "gold.bad:2: no 'refs'"),
    "number": (b'{"tgt": "a"}\n{"tgt": 3}\n{}\n', "gold.bad:2: 'tgt' is neither a text nor a list of tokens"),
    "references": (b'{"refs": ["a"]}\n{"refs": [3]}\n{}\n', "gold.bad:2: 'refs' is no list of texts"),
    "too few": (b"a\nb\n", "ckpt-500.dev has 3 lines and gold.bad 2"),
    "too many": (b"a\nb\nc\nd\n", "ckpt-500.dev has 3 lines and gold.bad 4; --subset 3 compares the first 3"),
}


@pytest.mark.parametrize("name", BAD_GOLD)
def test_bad_references(run, folder, name):
    data, message = BAD_GOLD[name]
    write("gold.bad", data)
    outcome = run("--task", "xsum", "--gold", "gold.bad", "--pred", "ckpt-500.dev", "--json", "scores.json")
    assert message in outcome.error()
    assert outcome.out == "" and not Path("scores.json").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "pred is empty"), (b"a\n\xc3\nc\n", "pred:2: not UTF-8 text"), (b"a\n", "pred has 1 lines")],
)
def test_bad_predictions(run, folder, data, message):
    write("pred", data)
    assert message in run(*XSUM, "--pred", "ckpt-500.dev", "pred").error()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gold_field", "tgt"], "--gold_field tgt: gold.txt is plain text"),
        (["--pred", "missing"], "--pred missing: there is no such file"),
        (["--pred", "no*"], "--pred no*: there is no such file"),
        (["--pred", "."], "--pred .: there is no such file"),
        (["--gold", "missing"], "cannot read missing: No such file or directory"),
        (["--gold", "."], "cannot read .: Is a directory"),
        (["--json", "no/scores.json"], "no/scores.json: cannot be written: there is no folder"),
        (["--json", "."], ".: cannot be written: it is a folder"),
        (["--task", "translation"], "--task"),
        (["--pool_key", "sentence"], "--pool_key is not for --task xsum"),
        (["--duplicate_rate", "0.5"], "--duplicate_rate is not for --task xsum"),
        (["--task", "qg", "--trunc_len", "3"], "--trunc_len is not for --task qg"),
        (["--task", "qg", "--pool_key", "title"], "--pool_key"),
        (["--task", "qg", "--pool_key", "sentence"], "--pool_key sentence: gold.txt is plain text"),
        (["--task", "qg", "--pool_key", "none", "--pool_file", "gold.txt"], "exclude one another"),
        (["--task", "qg", "--pool_file", "short"], "short has 1 lines and gold.txt 3"),
        (["--task", "qg", "--meteor", "wordnet"], "--meteor"),
        (["--trunc_len", "-1"], "--trunc_len: must not be negative"),
        (["--bootstrap", "0"], "--bootstrap: must be at least 1"),
        (["--processes", "0"], "--processes: must be at least 1"),
        (["--task", "cnndm", "--duplicate_rate", "nan"], "--duplicate_rate: must be a number from 0 on"),
        (["--save_best"], "--save_best needs --split"),
        (["--save_best", "--split", "a/b"], "--split a/b"),
    ],
)
def test_bad_flags(run, folder, argv, message):
    write("short", "x\n")
    outcome = run(*XSUM, "--pred", "ckpt-500.dev", *argv)
    assert message in outcome.error() and outcome.out == ""


def test_pooling_needs_its_field_in_every_line(run, folder):
    records = [{"tgt": "a", "src": "x", "sent_tok": "y"}, {"tgt": "b", "src": "x"}, {"tgt": "c", "src": 3}]
    argv = ("--task", "qg", "--gold", json_lines("gold.jsonl", records), "--pred", "ckpt-500.dev")
    assert "gold.jsonl:2: no 'sent_tok'" in run(*argv, "--pool_key", "sentence").error()
    assert "gold.jsonl:3: 'src' is neither a text nor a list of tokens" in run(*argv).error()
    assert run(*argv, "--pool_key", "none").status == 0


def test_token_lists_and_half_characters(run, folder):
    json_lines(
        "gold.jsonl", [{"tgt": ["who", "play", "##s", "?"], "src": ["a", "##b"]}, {"tgt": "\ud83d x ?", "src": "c"}]
    )
    write("pred", "who plays ?\n\ufffd x ?\n")
    outcome = run("--task", "qg", "--gold", "gold.jsonl", "--pred", "pred", "--tokenization", "none", "--json", "-")
    assert json.loads(outcome.out)["files"][0]["scores"]["rougeL"] == pytest.approx(100)

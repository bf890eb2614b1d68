"""Extracted answers: official scores, files, offsets of tokens, windows, choosing answers, and what goes wrong."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Runner
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_fast import evaluate_qa
from minilm_fast.data.answer_windows import WindowOptions, locate, make_windows
from minilm_fast.data.squad import Answer, gold_answers, language_of, read_squad, set_names
from minilm_fast.errors import UserError
from minilm_fast.metrics.squad import LANGUAGES, squad_scores, squad_v2_scores
from minilm_fast.modeling.answers import AnswerOptions, choose_answer, max_context
from minilm_fast.tokenization import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
SCORES = json.loads((GOLDENS / "squad" / "scores.json").read_text())
WORDS = "the old light ##house was built in 1874 by ada holm an engineer its lamp lens shine ##s 3 ##0 ##km ( ) , ."
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTEXT = "The old\u202flighthouse  was built\nin 1874 by Ádá Holm, an engineer."


@pytest.fixture
def run(capfdbinary: Any) -> Runner:
    return Runner(capfdbinary)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS.split()]) + "\n")
    return Tokenizer.from_pretrained(path, do_lower_case=True)


def entry(context: str = CONTEXT, **question: Any) -> dict[str, Any]:
    found = {"id": "q", "question": "Who built the lighthouse?", "answers": [answer("Ádá Holm", context)]} | question
    return {"paragraphs": [{"context": context, "qas": [found]}]}


def answer(text: str, context: str = CONTEXT) -> dict[str, Any]:
    return {"text": text, "answer_start": context.find(text)}


def write(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": list(entries)}), encoding="utf-8")
    return path


@pytest.mark.parametrize("language", LANGUAGES)
def test_scores_of_the_official_scripts(language: str) -> None:
    case = SCORES[language]
    answers = gold_answers(read_squad(GOLDENS / "squad" / case["data"], with_answers=True))
    assert squad_scores(answers, case["predictions"], language) == pytest.approx(case["mlqa"], abs=1e-12)
    assert squad_scores(answers, case["predictions"]) == pytest.approx(case["squad_v1"], abs=1e-12)
    assert language_of(case["data"]) == language


@pytest.mark.parametrize(
    ("name", "options"), [("plain", {}), ("with_odds", {"odds": True}), ("thresh_0.3", {"odds": True, "limit": 0.3})]
)
def test_scores_of_squad_2(name: str, options: dict[str, Any]) -> None:
    case = SCORES["v2"]
    answers = gold_answers(read_squad(GOLDENS / "squad" / case["data"], with_answers=True))
    odds = case["na_probs"] if options.get("odds") else None
    found = squad_v2_scores(answers, case["predictions"], odds, options.get("limit", 1.0))
    assert found == pytest.approx(case[name], abs=1e-12)
    assert found.keys() == case[name].keys()


def test_scores_need_what_they_compare() -> None:
    with pytest.raises(UserError, match="no prediction of question b"):
        squad_v2_scores({"a": ["x"], "b": []}, {"a": "x"})
    with pytest.raises(UserError, match="no no-answer probability of question a"):
        squad_v2_scores({"a": []}, {"a": ""}, {})
    with pytest.raises(UserError, match="question a has no answer"):
        squad_scores({"a": []}, {"a": ""})
    with pytest.raises(UserError, match="no questions"):
        squad_scores({}, {})


def test_evaluate_qa(run: Runner, tmp_path: Path) -> None:
    files = {}
    for name in ("de", "zh", "v2"):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(SCORES[name]["predictions"]))
    data = [GOLDENS / "squad" / SCORES[name]["data"] for name in ("de", "zh", "v2")]
    one = run(evaluate_qa.main, "--data_file", data[0], "--prediction_file", files["de"])
    assert json.loads(one.out) == pytest.approx(SCORES["de"]["mlqa"]) and not one.err
    plain = ["--data_file", data[0], "--prediction_file", files["de"], "--answer_language", "none"]
    assert json.loads(run(evaluate_qa.main, *plain).out) == pytest.approx(SCORES["de"]["squad_v1"])
    both = ["--data_file", *data[:2], "--prediction_file", files["de"], files["zh"], "--json", tmp_path / "scores.json"]
    table = run(evaluate_qa.main, *both).out.splitlines()
    assert table[0].split("|")[1:-1] == ["    ", " Average ", "   de ", "   zh "]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["average"]["f1"] == pytest.approx((written["de"]["f1"] + written["zh"]["f1"]) / 2)
    odds = tmp_path / "odds.json"
    odds.write_text(json.dumps(SCORES["v2"]["na_probs"]))
    two = [
        "--version_2_with_negative",
        "--data_file",
        data[2],
        "--prediction_file",
        files["v2"],
        "--na_prob_file",
        odds,
    ]
    assert json.loads(run(evaluate_qa.main, *two).out) == pytest.approx(SCORES["v2"]["with_odds"])


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("{}", ["--answer_language", "fr"], "--answer_language: 'fr' is not a language of MLQA (en, es, de"),
        ('{"de0": 3}', [], "'de0' has 3 where a text was expected"),
        ("[]", [], "not a JSON object of question ids"),
        ('{"de0": "a"', [], "broken JSON (it is cut off at line 1, column 12)"),
        ("{}", ["--na_prob_file", "x"], "--na_prob_file needs --version_2_with_negative"),
        ("{}", ["--version_2_with_negative"], "there is no prediction of question de0 (and of 5 more)"),
        ("{}", ["--na_prob_file", "x", "y"], "--na_prob_file names 2 files and --data_file 1"),
    ],
)
def test_evaluate_qa_says_what_is_wrong(
    content: str, flags: list[str], message: str, run: Runner, tmp_path: Path
) -> None:
    (tmp_path / "p.json").write_text(content)
    data = GOLDENS / "squad" / SCORES["de"]["data"]
    outcome = run(evaluate_qa.main, "--data_file", data, "--prediction_file", tmp_path / "p.json", *flags)
    assert message in outcome.error()


def test_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.json", entry())
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.json.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    read = [read_squad(tmp_path / name)[0].questions[0] for name in ("a.json", "a.json.gz", "a.json.xz")]
    assert [question.answers for question in read] == [(Answer("Ádá Holm", 41),)] * 3
    names = ["xquad.el.json.xz", "dev-context-es-question-de.json", "dev-v2.0.json.gz"]
    assert set_names([Path(name) for name in names]) == ["el", "es", "dev-v2.0"]
    assert set_names([Path("a/xquad.el.json"), Path("a/test-context-el-question-el.json")]) == [
        "xquad.el",
        "test-context-el-question-el",
    ]
    assert set_names([Path("a/x.json"), Path("b/x.json")]) == ["x-0", "x-1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"data": [', "broken JSON (it is cut off at line 1, column 11)"),
        ('{"data": }', "broken JSON (Expecting value at line 1, column 10)"),
        ("[]", "not a JSON object"),
        ("{}", "no 'data'"),
        ('{"data": 3}', "a.json.data: not a list"),
        ('{"data": []}', "holds no questions"),
        ('{"data": [{}]}', "a.json: data[0]: no 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "data[0].paragraphs[0]: no 'context'"),
        (json.dumps({"data": [entry(" \n ")]}), "data[0].paragraphs[0]: the context has no words"),
        (json.dumps({"data": [entry(), entry()]}), "data[1].paragraphs[0].qas[0]: the id q comes twice"),
        (json.dumps({"data": [entry(question=None)]}), "data[0].paragraphs[0].qas[0].question: not a text"),
        (json.dumps({"data": [entry(id=[])]}), "qas[0].id: not a text"),
        (json.dumps({"data": [entry(is_impossible="no")]}), "qas[0].is_impossible: not true or false"),
        (json.dumps({"data": [entry(answers=[{}])]}), "qas[0].answers[0]: no 'text'"),
        (
            json.dumps({"data": [entry(answers=[{"text": "a", "answer_start": "1"}])]}),
            "qas[0].answers[0].answer_start: not an integer",
        ),
    ],
)
def test_files_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_squad(tmp_path / "a.json", with_answers=True)
    assert message in str(caught.value)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    content = lzma.compress(json.dumps({"data": [entry(str(number)) for number in range(200)]}).encode())
    (tmp_path / "a.json.xz").write_bytes(content[:-40])
    with pytest.raises(UserError, match=r"a.json.xz: the compressed file is cut off"):
        read_squad(tmp_path / "a.json.xz")
    entries = [entry()]
    del entries[0]["paragraphs"][0]["qas"][0]["answers"]
    write(tmp_path / "b.json", *entries)
    assert read_squad(tmp_path / "b.json")[0].questions[0].answers == ()
    with pytest.raises(UserError, match=r"qas\[0\]: no 'answers'"):
        read_squad(tmp_path / "b.json", with_answers=True)


def test_offsets_of_tokens(tokenizer: Tokenizer) -> None:
    text = "\u0130 LightHouses [SEP]e\u0301 (30km) \u00adzzz\u4e2d "
    tokens, offsets = tokenizer.tokenize_with_offsets(text)
    assert tokens == tokenizer.tokenize(text)
    assert [text[start:end] for start, end in offsets] == [
        "\u0130", "Light", "House", "s", "[SEP]", "e\u0301", "(", "3", "0", "km", ")", "zzz", "\u4e2d"
    ]  # fmt: skip
    tokens, offsets = tokenizer.tokenize_with_offsets("SHINES lighthouse,")
    assert tokens == ["shine", "##s", "light", "##house", ","]
    assert offsets == [(0, 5), (5, 6), (7, 12), (12, 17), (17, 18)]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("aáA\u0301\u0327 \u00a0\u00ad.[SEP]\u0130ßﬁ中\uac00lighthouse"), max_size=30))
def test_offsets_go_with_the_tokens_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    tokens, offsets = tokenizer.tokenize_with_offsets(text)
    assert tokens == tokenizer.tokenize(text)
    assert len(tokens) == len(offsets)
    assert all(0 <= start <= end <= len(text) and text[start:end] == text[start:end].strip() for start, end in offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)


def test_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paragraphs = read_squad(write(tmp_path / "a.json", entry()), with_answers=True)
    options = WindowOptions(max_seq_length=15, doc_stride=4, max_query_length=3)
    windows = make_windows(paragraphs, tokenizer, options, training=True)
    context = tokenizer.tokenize(CONTEXT)
    for number, window in enumerate(windows):
        tokens = tokenizer.convert_ids_to_tokens(window.input_ids())
        assert tokens[:5] == ["[CLS]", "[UNK]", "built", "the", "[SEP]"] and tokens[-1] == "[SEP]"
        assert tokens[5:-1] == context[4 * number : 4 * number + 9]
        assert window.token_type_ids().tolist() == [0] * 5 + [1] * (len(tokens) - 5)
        assert len(window) == len(tokens) <= 15
        start, end = window.span
        assert tokens[start : end + 1] in (["ada", "holm"], ["[CLS]"])
    assert [window.start for window in windows] == [0, 4, 8] and windows[-1].start + windows[-1].length == len(context)
    assert [window.span != (0, 0) for window in windows] == [False, True, True]
    kept = max_context(windows)
    assert np.array_equal(sum(np.bincount(window.start + np.flatnonzero(own), minlength=len(context))
                              for window, own in zip(windows, kept, strict=True)), np.ones(len(context)))  # fmt: skip
    parallel = make_windows(paragraphs * 40, tokenizer, options, training=True, threads=2)
    assert [w.input_ids().tolist() for w in parallel[:3]] == [w.input_ids().tolist() for w in windows]
    assert [w.question for w in parallel[::3]] == list(range(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((10, 4, 64), "--max_seq_length 10 leaves no room for the context beside a question of 6 tokens"),
        ((20, 14, 64), "--doc_stride 14 passes over a part of the context, of which 11 tokens fit into a window"),
    ],
)
def test_windows_that_are_too_small(
    options: tuple[int, int, int], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    paragraphs = read_squad(write(tmp_path / "a.json", entry(question="who built the old lamp lens")))
    if options[0] == 10:
        options = (8, *options[1:])
        message = message.replace("10", "8")
    with pytest.raises(UserError) as caught:
        make_windows(paragraphs, tokenizer, WindowOptions(*options), training=False)
    assert message in str(caught.value) and "data[0].paragraphs[0].qas[0]" in str(caught.value)


def test_answers_that_are_not_where_the_file_says(tokenizer: Tokenizer, tmp_path: Path) -> None:
    wrong = entry(id="lost", answers=[answer("Ada Holm") | {"answer_start": 5}])
    path = write(tmp_path / "a.json", entry(), wrong, entry(id="none", answers=[]))
    with pytest.warns(UserWarning, match=r"2 questions are left out.*data\[1\].paragraphs\[0\].qas\[0\] \(id lost\)"):
        windows = make_windows(read_squad(path), tokenizer, WindowOptions(), training=True, name=str(path))
    assert [window.question for window in windows] == [0]
    write(path, wrong)
    with pytest.raises(UserError, match=r"a.json: there is nothing to train on: 1 questions are left out"):
        make_windows(read_squad(path), tokenizer, WindowOptions(), training=True, name=str(path))


@pytest.mark.parametrize(
    ("text", "start", "place"),
    [
        ("was", 20, (20, 23)),
        ("was", 22, (20, 23)),
        ("built in", 24, (24, 32)),
        ("old lighthouse was", 4, (4, 23)),
        ("olm", 45, (46, 49)),
        ("Holm", 24, None),
        ("", 4, None),
        ("The", -1, None),
        ("The", 500, None),
    ],
)
def test_locate(text: str, start: int, place: tuple[int, int] | None) -> None:
    assert locate(CONTEXT, Answer(text, start)) == place


def test_a_context_without_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paragraphs = read_squad(write(tmp_path / "a.json", entry("\u00ad \u200b")))
    with pytest.raises(UserError, match=r"data\[0\].paragraphs\[0\]: the context has no words"):
        make_windows(paragraphs, tokenizer, WindowOptions(), training=False)


def test_choosing_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paragraphs = read_squad(write(tmp_path / "a.json", entry()))
    windows = make_windows(paragraphs, tokenizer, WindowOptions(max_seq_length=19, doc_stride=6), training=False)
    assert len(windows) == 2
    logits = [np.full((len(window), 2), -5.0, dtype=np.float32) for window in windows]
    for window, scores in zip(windows, logits, strict=True):
        first = len(window.prefix) - window.start
        for token, score in ((9, 4.0), (8, 6.0)):
            if window.start <= token < window.start + window.length:
                scores[first + token, 0] = score
        for token, score in ((10, 3.0), (7, 9.0)):
            if window.start <= token < window.start + window.length:
                scores[first + token, 1] = score
        scores[0] = 2.0
    plain = choose_answer(windows, logits, AnswerOptions(n_best_size=2))
    assert plain.text == plain.candidates[0].text == "by Ádá Holm" and plain.candidates[1].text == "Ádá Holm"
    assert len(plain.candidates) == 2 and all(candidate.text in CONTEXT for candidate in plain.candidates)
    assert sum(float(each["probability"]) for each in plain.nbest()) == pytest.approx(1)
    short = choose_answer(windows, logits, AnswerOptions(max_answer_length=2))
    assert short.text == "Ádá Holm"
    negative = AnswerOptions(version_2_with_negative=True)
    found = choose_answer(windows, logits, negative)
    assert (found.text, found.null_odds) == ("by Ádá Holm", 4.0 - 9.0) and "" in [c.text for c in found.candidates]
    assert (
        choose_answer(windows, logits, AnswerOptions(version_2_with_negative=True, null_score_diff_threshold=-6)).text
        == ""
    )
    for scores in logits:
        scores[0] = 20.0
    assert choose_answer(windows, logits, negative).text == ""

"""The metrics against the official programs' numbers, and their behaviour at the edges."""

import io
import json
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from minilm_fast import metrics
from minilm_fast.errors import UserError
from minilm_fast.metrics import meteor_score, questions, rouge_scores

GOLDENS = Path(__file__).resolve().parent / "goldens" / "metrics"


def records(name):
    return [json.loads(line) for line in (GOLDENS / name).read_text(encoding="utf8").rstrip("\n").split("\n")]


QUESTIONS = records("questions.jsonl")
PREDICTIONS = [record["pred"] for record in QUESTIONS]
REFERENCES = [[record["ref_tok"]] for record in QUESTIONS]
KEYS = {
    "none": None,
    "passage": [record["src"] for record in QUESTIONS],
    "sentence": [record["sent_tok"] for record in QUESTIONS],
}
EXPECTED = json.loads((GOLDENS / "questions_scores.json").read_text())


def test_rouge_is_that_of_the_perl_script():
    cases = records("rouge155.jsonl")
    found = metrics.rouge_of_each([case["candidate"] for case in cases], [[case["reference"]] for case in cases])
    parts = ("precision", "recall", "f_score")
    perl = [[[case["rouge155"][f"rouge_{n}_{part}"] for part in parts] for n in "12l"] for case in cases]
    np.testing.assert_allclose(found, perl, atol=1e-4)


def test_rouge_averages_in_percent():
    found = metrics.rouge(["a b c d", ""], [["a b x y"], ["a"]])
    assert found["rouge1"] == metrics.RougeScore(25.0, 25.0, 25.0)
    assert found["rouge2"].f == pytest.approx(100 / 6)


def test_rouge_takes_the_best_reference_and_joins_sentences():
    assert metrics.rouge(["a b"], [["c d", "a b"]])["rouge2"].f == 100
    # The longest common subsequence of each sentence, whatever their order in the text.
    assert metrics.rouge(["c d\na b"], [["a b\nc d"]])["rougeL"].f == 100
    assert metrics.rouge(["c d a b"], [["a b c d"]])["rougeL"].f == 50


def test_rouge_stems_as_porter_did():
    stemmed = metrics.rouge(["aged running"], [["age runs"]])
    assert stemmed["rouge1"].f == 50
    assert metrics.rouge(["aged running"], [["age runs"]], stemming=False)["rouge1"].f == 0


@pytest.mark.parametrize(
    ("word", "stem"),
    # Words that the stemmer of the Perl script treats otherwise than NLTK's, and some that all treat alike.
    [
        ("aged", "ag"),
        ("environmental", "environ"),
        ("congressional", "congress"),
        ("replacement", "replac"),
        ("adoption", "adopt"),
        ("argument", "argum"),
        ("cement", "cement"),
        ("relational", "relat"),
        ("skies", "ski"),
    ],
)
def test_stems_of_the_perl_script(word, stem):
    assert rouge_scores.perl_stemmer()(word) == stem


def test_irregular_words():
    assert metrics.rouge(["she held it"], [["she holds it"]])["rouge1"].f == pytest.approx(200 / 3)
    # What is looked up is not stemmed; words of three letters are not looked up.
    exceptions = {"held": "hold", "worse": "bad", "she": "her"}
    assert metrics.rouge(["she held it"], [["she holds it"]], exceptions=exceptions)["rouge1"].f == 100
    assert metrics.rouge(["worse"], [["bad"]], exceptions=exceptions)["rouge1"].f == 100


def test_rouge_in_several_processes():
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "running", "runs"]
    texts = [" ".join(generator.choices(words, k=generator.randint(0, 9))) for _ in range(600)]
    references = [[" ".join(generator.choices(words, k=6))] for _ in texts]
    alone = metrics.rouge_of_each(texts, references)
    np.testing.assert_array_equal(metrics.rouge_of_each(texts, references, processes=2), alone)


def _die(*chunk):
    os._exit(9)


def test_a_killed_process_is_one_line(monkeypatch):
    monkeypatch.setattr(rouge_scores, "_score_chunk", _die)
    with pytest.raises(UserError, match="a process that computes ROUGE was killed"):
        metrics.rouge_of_each(["a"] * 600, [["a"]] * 600, processes=2)


def test_bootstrap_bounds_the_mean():
    generator = random.Random(1)
    predictions = ["right" if generator.random() < 0.5 else "wrong" for _ in range(400)]
    found = metrics.rouge(predictions, [["right"]] * 400, resamples=500, seed=3)["rouge1"]
    share = predictions.count("right") / 400
    error = 196 * (share * (1 - share) / 400) ** 0.5
    assert found.f == pytest.approx(100 * share)
    assert found.low == pytest.approx(found.f - error, abs=0.6)
    assert found.high == pytest.approx(found.f + error, abs=0.6)
    assert metrics.rouge(predictions, [["right"]] * 400, resamples=500, seed=3)["rouge1"] == found


@pytest.mark.parametrize("key", KEYS)
def test_questions_score_as_pycocoevalcap_says(key):
    found = metrics.question_generation(PREDICTIONS, REFERENCES, keys=KEYS[key])
    expected = {name: value for name, value in EXPECTED[key].items() if name != "meteor"}
    assert found == pytest.approx(expected, abs=1e-5)


def test_meteor_is_that_of_the_java_program():
    pytest.importorskip("pycocoevalcap")
    if meteor_score.shutil.which("java") is None:
        pytest.skip("there is no Java")
    found = metrics.question_generation(
        PREDICTIONS, REFERENCES, keys=KEYS["sentence"], meteor_implementation="pycocoevalcap"
    )
    assert found["meteor"] == pytest.approx(EXPECTED["sentence"]["meteor"], abs=1e-4)


class _Program:
    """Stands for pycocoevalcap's wrapper of the Java program."""

    texts = None
    fails = False

    def __init__(self):
        self.meteor_p = self
        self.stderr = io.BytesIO(b"Picked up options\nOut of memory\n")
        assert "-Dfile.encoding=UTF-8" in os.environ["JAVA_TOOL_OPTIONS"]

    def kill(self):
        pass

    def compute_score(self, gold, found):
        if self.fails:
            raise ValueError("could not convert string to float: ''")
        type(self).texts = (gold, found)
        return 0.25, [0.25, 0.25]


@pytest.fixture
def program(monkeypatch):
    module = types.ModuleType("pycocoevalcap.meteor.meteor")
    module.Meteor = type("Meteor", (_Program,), {})
    for name in ("pycocoevalcap", "pycocoevalcap.meteor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(meteor_score.shutil, "which", lambda name: name)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xint")
    return module.Meteor


def test_no_text_breaks_the_protocol_of_meteor(program):
    assert metrics.meteor(["", "a ||| b\u2028\rc"], [["x\ny"], ["a|||b", "c"]]) == 25
    assert program.texts == ({0: ["x y"], 1: ["a b", "c"]}, {0: [""], 1: ["a b c"]})
    assert os.environ["JAVA_TOOL_OPTIONS"] == "-Xint"


def test_a_failure_of_meteor_is_one_line(program):
    program.fails = True
    with pytest.raises(UserError, match="METEOR's program failed: Out of memory"):
        metrics.meteor(["a"], [["a"]])


def test_pooling_keeps_all_references_and_the_last_prediction():
    pooled = questions.pool(["p1", "p2", "p3"], [["r1"], ["r2"], ["r3", "r4"]], ["a", "b", "a"])
    assert pooled == (["p3", "p2"], [["r1", "r3", "r4"], ["r2"]])


def test_bleu_takes_the_closest_reference_length():
    scores = metrics.bleu(["a b c d e"], [["a b c d e f g h i", "a b c d"]])
    assert scores["brevity_penalty"] == 1 and scores["length_ratio"] == 5 / 4
    assert scores["bleu1"] == pytest.approx(100) and scores["bleu4"] == pytest.approx(100)
    short = metrics.bleu(["a b c d"], [["a b c d e f g h"]])
    assert short["bleu4"] == pytest.approx(100 * np.exp(1 - 8 / 4))


def test_coco_rouge_l_may_take_precision_and_recall_from_different_references():
    # Precision 1 from the long reference, recall 1 from the short one.
    assert metrics.coco_rouge_l(["a b"], [["a b c d", "a"]]) == pytest.approx(100)
    precision, recall = 0.5, 0.25
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert metrics.coco_rouge_l(["a x"], [["a b c d"]]) == pytest.approx(100 * expected)


def test_empty_predictions_score_nothing():
    found = metrics.question_generation(["", ""], [["a b c d"], ["b"]])
    assert found == {"bleu1": 0, "bleu2": 0, "bleu3": 0, "bleu4": 0, "rougeL": 0, "items": 2}
    assert metrics.rouge([""], [["a"]])["rougeL"].f == 0


@pytest.mark.parametrize("score", [metrics.rouge, metrics.bleu, metrics.coco_rouge_l, metrics.question_generation])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no examples"),
        (["a"], [["a"], ["b"]], "1 predictions, 2 references"),
        (["a", "b"], [["a"], []], "example 2 has no reference"),
        (["a"], ["a"], "example 1: references must be a sequence of texts"),
    ],
)
def test_wrong_arguments(score, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)


def test_unknown_names_and_numbers_of_keys():
    with pytest.raises(ValueError, match="METEOR implementations are none, pycocoevalcap, not 'x'"):
        metrics.question_generation(["a"], [["a"]], meteor_implementation="x")
    with pytest.raises(ValueError, match="1 predictions, 2 keys"):
        metrics.question_generation(["a"], [["a"]], keys=["k", "l"])
    with pytest.raises(ValueError, match="tasks are xsum, cnndm, gigaword, qg, not 'x'"):
        metrics.generation_scores("x", ["a"], [["a"]])


@pytest.mark.parametrize("task", metrics.TASKS)
def test_generation_scores(task):
    predictions = ["the cat sat on a mat .", "", "nothing of this kind is here at all"]
    references = [["The cat sat on a mat."], ["dogs bark"], ["Something else, entirely", "Nothing!"]]
    found = metrics.generation_scores(task, predictions, references)
    assert list(found) == (["bleu4", "rougeL"] if task == "qg" else ["rouge1", "rouge2", "rougeL"])
    assert metrics.best_metric(task) in found
    assert all(isinstance(value, float) and 30 < value < 100 for value in found.values())
    perfect = metrics.generation_scores(task, ["the cat sat on a mat ."] * 2, [["The cat sat on a mat."]] * 2)
    assert all(value == pytest.approx(100) for value in perfect.values())


@pytest.mark.parametrize(
    ("module", "package", "score"),
    [("rouge_score.rouge_scorer", "rouge-score", metrics.rouge), ("sacrebleu.metrics", "sacrebleu", metrics.bleu)],
)
def test_missing_packages_are_named(monkeypatch, module, package, score):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"this metric needs {package}: pip install 'minilm_fast\[metrics\]'"):
        score(["a"], [["a"]])


def test_missing_java_is_one_line(program, monkeypatch):
    monkeypatch.setattr(meteor_score.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs Java: there is no program 'java'"):
        metrics.meteor(["a"], [["a"]])


def test_missing_pycocoevalcap_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(UserError, match="pip install pycocoevalcap"):
        metrics.meteor(["a"], [["a"]])

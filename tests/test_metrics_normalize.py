"""Tokenisation and sentence rules of the official scripts."""

import json
from pathlib import Path

import pytest

from minilm_fast.metrics import normalize
from minilm_fast.metrics.tasks import question_texts, summary_prediction, summary_reference

GOLDENS = Path(__file__).resolve().parent / "goldens" / "metrics" / "fix_tokenization.jsonl"
CASES = [json.loads(line) for line in GOLDENS.read_text(encoding="utf8").rstrip("\n").split("\n")]
FIXES = {
    "xsum": lambda text: normalize.fix_tokenization(text, normalize.XSUM),
    "cnndm": lambda text: normalize.fix_tokenization(text, normalize.CNNDM),
    "gigaword": lambda text: normalize.one_sentence(text, normalize.GIGAWORD),
    "nqg": normalize.nqg_question,
}


@pytest.mark.parametrize("script", FIXES)
def test_fix_tokenization_is_that_of_the_scripts(script):
    assert [FIXES[script](case["text"]) for case in CASES] == [case[script] for case in CASES]


def test_wordpieces_are_joined():
    assert normalize.join_wordpieces(["##a", "play", "##ing", "is", "fun"]) == "##a playing is fun"
    assert normalize.join_wordpieces([]) == ""


def test_basic_tokens():
    assert normalize.basic_tokens("Beyoncé's  “U.S.” [UNK] co-op?") == "beyonce ' s “ u . s . ” [unk] co - op ?"
    once = normalize.basic_tokens("Don't! (12,000)")
    assert normalize.basic_tokens(once) == once


FIRST = "one two three four five ."
SECOND = "six seven eight nine ten ."


def test_summaries_lose_short_and_repeated_sentences():
    text = f"{FIRST} [X_SEP] too short . [X_SEP] {SECOND} [X_SEP] one two three four six ten . [X_SEP]"
    assert summary_prediction("cnndm", text) == f"{FIRST}\n{SECOND}"
    kept = summary_prediction("cnndm", text, duplicate_rate=0)
    assert (
        kept
        == summary_prediction("cnndm", text, duplicate_rate=1)
        == f"{FIRST}\n{SECOND}\none two three four six ten ."
    )


def test_a_sentence_is_dropped_beyond_the_rate_only():
    # 7 of 10 distinct words came before: exactly 0.7, so it stays.
    text = "a b c d e f g [X_SEP] a b c d e f g h i j"
    assert summary_prediction("cnndm", text).count("\n") == 1
    assert summary_prediction("cnndm", text, duplicate_rate=0.69).count("\n") == 0


def test_truncation_counts_words_over_sentences():
    text = f"{FIRST} [X_SEP] {SECOND}"
    assert summary_prediction("cnndm", text, trunc_len=8) == f"{FIRST}\nsix seven"
    assert summary_prediction("cnndm", text, trunc_len=6) == FIRST
    assert summary_prediction("xsum", "a b c", trunc_len=2) == "a b"
    assert summary_prediction("cnndm", " ".join(map(str, range(200)))).split()[-1] == "159"


def test_references():
    assert summary_reference("cnndm", "a . <S_SEP> b ( c )", raw=False) == "a .\nb ( c )"
    assert summary_reference("cnndm", "a .\nb [X_SEP] c", raw=True) == "a .\nb\nc"
    assert summary_reference("xsum", "a (b)", raw=True) == "a -LRB- b -RRB-"
    assert summary_reference("gigaword", " a  (b) ", raw=True) == "a (b)"


def test_question_texts():
    predictions, references = ["What ' s  in ( it ) ?"], [["What's in (it)?", "who"]]
    assert question_texts(predictions, references, "none") == (["What ' s in ( it ) ?"], references)
    assert question_texts(predictions, references, "nqg")[0] == ["what 's in -lrb- it -rrb- ?"]
    split = "what ' s in ( it ) ?"
    assert question_texts(predictions, references, "bert") == ([split], [[split, "who"]])
    with pytest.raises(ValueError, match="tokenisations are nqg, bert, none, not 'x'"):
        question_texts(predictions, references, "x")

"""Heads over packed weights: as the network itself, kept until the weights change; labels and answers of texts."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import Runner
from test_heads import CASES, LENGTH, MASKS, make_inputs, make_small, make_theirs
from understanding_files import RUN, arguments, error_line, results, sentences, write_table, write_vocabulary

import minilm_fast
from minilm_fast import run_glue
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads.packed import PackedHead
from minilm_fast.ops import backend
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.classification import ClassificationOptions, ClassificationTask
from minilm_fast.training.head_task import Scorer
from minilm_fast.training.precision import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

# Logits are of the order of 1.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.1}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_logits_equal_the_models_own(name: str, family: str, dtype: str, tmp_path: Path) -> None:
    """In evaluation mode, whatever mode the model is in."""
    head = getattr(minilm_fast, name)
    make_theirs(family, head).save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path).train()
    model.bert.embeddings.eval()
    inputs = make_inputs(family, head, MASKS["holes"])
    found = parts(PackedHead(model, dtype)(**inputs))
    assert model.training and model.bert.encoder.training and not model.bert.embeddings.training
    assert all(not part.requires_grad and part.dtype == torch.float32 for part in found)
    with torch.no_grad():
        expected = parts(model.eval()(**inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype])
    assert dtype == "fp32" or not any(map(torch.equal, found, expected))
    with backend("reference"):
        torch.testing.assert_close(parts(PackedHead(model, dtype)(**inputs)), found, rtol=0, atol=TOLERANCES[dtype])


def parts(logits: Any) -> list[torch.Tensor]:
    return list(logits) if isinstance(logits, tuple) else [logits]


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", ["SequenceClassifier", "TokenClassifier"])
def test_relative_positions_and_other_activations(name: str, activation: str) -> None:
    torch.manual_seed(0)
    model = make_small(name, rel_pos_bins=8, max_rel_pos=6, hidden_act=activation, initializer_range=0.3)
    batch = TokenBatch.from_sequences([list(range(5, 5 + n)) for n in (7, 1, 20)])
    with torch.no_grad():
        torch.testing.assert_close(PackedHead(model)(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_weights_are_packed_anew_when_they_have_changed() -> None:
    torch.manual_seed(0)
    model = make_small("SequenceClassifier", initializer_range=0.3)
    ids = torch.randint(5, 60, (2, LENGTH))
    first = model.packed("fp32")
    assert model.packed("fp32") is first and copy.deepcopy(model)._packed is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids).sum().backward()
    optimizer.step()
    second = model.packed("fp32")
    assert second is not first
    with torch.no_grad():
        torch.testing.assert_close(second(ids), model(ids), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(first(ids), model(ids), rtol=1e-5, atol=1e-5)
    half = model.packed("bf16")
    assert half.dtype == "bf16" and model.packed("bf16") is half
    with backend("reference"):
        assert model.packed("bf16") is not half


def test_what_cannot_be_packed() -> None:
    with pytest.raises(UserError, match="dtype must be one of fp32, bf16, int8, got 'fp16'"):
        make_small("TokenClassifier").packed("fp16")
    with pytest.raises(UserError, match="packed for a CPU or a GPU, the model is on meta"):
        make_small("TokenClassifier").to("meta").packed()


def make_model(folder: Path, name: str, **changes: Any) -> Any:
    """A model of transformers with a vocabulary beside it, both as a user's folder has them; ours from it."""
    head = getattr(minilm_fast, name)
    make_theirs("Bert", head, vocab_size=97, **changes).save_pretrained(folder)
    write_vocabulary(folder)
    return head.from_pretrained(folder)


TEXTS = ["w3 w4 w5", ("w6 w7", "w8"), "w9", ("w1", "w2 w10 w11 w12")]


def test_labels_of_texts_are_those_of_the_pipeline(tmp_path: Path) -> None:
    import transformers

    model = make_model(tmp_path, "SequenceClassifier")
    model.train()
    found = model.predict(TEXTS, batch_size=3)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    vocabulary = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    pipe = transformers.pipeline("text-classification", model=theirs, tokenizer=vocabulary, top_k=None)
    for text, ours in zip(TEXTS, found, strict=True):
        given = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
        expected = {each["label"]: each["score"] for each in pipe(given)}
        assert ours.scores == pytest.approx(expected, abs=1e-5) and sum(ours.scores.values()) == pytest.approx(1)
        assert ours.label == max(expected, key=expected.__getitem__) and ours.score == max(ours.scores.values())
    assert model.predict(TEXTS[1]).scores == pytest.approx(found[1].scores, abs=1e-6)
    assert model.predict(TEXTS[0]).scores == pytest.approx(found[0].scores, abs=1e-6)
    assert model.predict(iter(TEXTS), dtype="int8")[3].scores == pytest.approx(found[3].scores, abs=0.05)
    assert model.predict([]) == []
    assert model.predict("w3 w4 w5 w6 w7", max_seq_length=5).scores == pytest.approx(found[0].scores, abs=1e-6)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_scores_follow_the_problem(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, "SequenceClassifier", problem_type=kind, num_labels=1 if kind == "regression" else 3)
    ids = torch.tensor([[2, 8, 9, 10, 3]])
    with torch.no_grad():
        logits = model.eval()(ids)[0]
    expected = logits if kind == "regression" else torch.sigmoid(logits)
    assert list(model.predict("w3 w4 w5").scores.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_answers_of_questions(tmp_path: Path) -> None:
    """Best by the logits of transformers' model; the answer is the context's own characters."""
    import transformers

    model = make_model(tmp_path, "QuestionAnswerer")
    question, context = "w50 w51", "w1  w2 w3\nw4 w5, w6 w7"
    found = model.predict(question, context, max_answer_length=3)
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    ids = [model.tokenizer.cls_id, *model.tokenizer.encode(question), model.tokenizer.sep_id]
    first = len(ids)
    ids += [*model.tokenizer.encode(context), model.tokenizer.sep_id]
    types = torch.tensor([[0] * first + [1] * (len(ids) - first)])
    with torch.no_grad():
        output = theirs(torch.tensor([ids]), token_type_ids=types)
    start, end = output.start_logits[0, first:-1], output.end_logits[0, first:-1]
    spans = {(i, j): float(start[i] + end[j]) for i in range(len(start)) for j in range(i, min(i + 3, len(end)))}
    i, j = max(spans, key=spans.__getitem__)
    assert found.chosen.score == pytest.approx(spans[i, j], abs=1e-5)
    words = model.tokenizer.convert_ids_to_tokens(ids[first + i : first + j + 1])
    assert found.text.replace(",", " ,").split() == words and context[found.start : found.end] == found.text
    assert found.score == pytest.approx(found.nbest()[0]["probability"]) and 0 < found.score <= 1
    many = model.predict([question, "w52", question], [context, context, "w8 w9"], batch_size=2)
    assert many[0].text == model.predict(question, context).text and many[2].text in "w8 w9"
    assert [each.text for each in model.predict([question, "w52"], context)] == [each.text for each in many[:2]]
    assert model.predict([], []) == []
    none = model.predict(question, context, version_2_with_negative=True, null_score_diff_threshold=-1000.0)
    assert (none.text, none.start, none.end) == ("", 0, 0)
    # The table of positions is shorter than the default length; more than it is an error where it is asked for.
    long = " ".join(f"w{n % 90}" for n in range(80))
    assert model.predict("w50", long, doc_stride=10).text in long


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("w1", ["w2", "w3"]), {}, "1 questions need as many contexts, or one for all, got 2"),
        ((["w1", 2], "w2"), {}, "question 1 must be a string, got int"),
        ((["w1"], [None]), {}, "context 0 must be a string, got NoneType"),
        (("w1", " \n"), {}, "question 0: the context has no words"),
        (("w1", "w2"), {"batch_size": 0}, "batch_size must be at least 1"),
        (("w1", "w2"), {"max_seq_length": 99}, "max_seq_length 99: the model has 30 positions"),
    ],
)
def test_questions_that_are_wrong(arguments: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_model(tmp_path, "QuestionAnswerer").predict(*arguments, **options)


def test_texts_that_are_wrong(tmp_path: Path) -> None:
    model = make_model(tmp_path, "SequenceClassifier")
    for texts in (["w1", 3], [("w1", "w2", "w3")], [["w1", "w2"]]):
        with pytest.raises(UserError, match="must be a string or a tuple of two"):
            model.predict(texts)
    with pytest.raises(UserError, match="max_seq_length must be from 5 to the model's 30, got 31"):
        model.predict("w1", max_seq_length=31)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        model.predict("w1", batch_size=0)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="the model has no tokenizer: give tokenizer_name"):
        minilm_fast.SequenceClassifier.from_pretrained(tmp_path / "bare").predict("w1")
    named = minilm_fast.SequenceClassifier.from_pretrained(
        tmp_path / "bare", tokenizer_name=str(tmp_path / "vocab.txt")
    )
    assert named.predict("w1").scores == model.predict("w1").scores
    set_later = minilm_fast.SequenceClassifier.from_pretrained(tmp_path / "bare")
    set_later.tokenizer = Tokenizer.from_pretrained(tmp_path / "vocab.txt")
    assert set_later.predict("w1").scores == model.predict("w1").scores


@pytest.fixture
def run(capfdbinary: Any) -> Runner:
    return Runner(capfdbinary)


def test_the_dtype_of_evaluation(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default that of the run; measures follow it."""
    write_vocabulary(tmp_path)
    for stem, count, seed in (("train", 60, 0), ("dev", 60, 1)):
        rows = [[f"{a} {b}", str(kind)] for a, b, kind in sentences(count, 2, seed)]
        write_table(tmp_path / "data" / f"{stem}.tsv", "sentence\tlabel", rows)
    used: list[str] = []
    plain = PackedHead.__init__
    monkeypatch.setattr(
        PackedHead, "__init__", lambda self, model, dtype: (used.append(dtype), plain(self, model, dtype))[1]
    )
    losses = {}
    flags = {"do_train": True, "do_eval": True, "max_steps": 10}
    assert run(run_glue.main, *arguments(tmp_path, task_name="sst-2", **(RUN | flags), bf16=True)).status == 0
    for dtype in ("fp32", "bf16", "int8"):
        outcome = run(run_glue.main, *arguments(tmp_path, task_name="sst-2", **RUN, do_eval=True, eval_dtype=dtype))
        assert outcome.status == 0, outcome.err
        losses[dtype] = results(tmp_path / "out")["measures"]["dev_loss"]
    assert used == ["bf16", "fp32", "bf16", "int8"]
    assert len(set(losses.values())) == 3 and max(losses.values()) - min(losses.values()) < 0.05
    wrong = run(run_glue.main, *arguments(tmp_path, task_name="sst-2", **RUN, do_eval=True, eval_dtype="fp16"))
    assert "--eval_dtype: invalid choice: 'fp16'" in error_line(wrong)


def test_what_computes_elsewhere() -> None:
    """fp16 goes through the model itself; int8 is for a CPU."""
    model = make_small("SequenceClassifier")
    tokens = TokenBatch.from_sequences([[5, 6], [7]])
    types = torch.zeros(3, dtype=torch.int32)
    with backend("reference"):
        half = Scorer(model, Precision("fp16", torch.device("cpu")), None, 64)
        assert half.multiple == 64
        with torch.no_grad():
            torch.testing.assert_close(half(tokens, types), model(tokens, token_type_ids=types), rtol=0.02, atol=0.01)
    assert Scorer(model, Precision("bf16", torch.device("cpu")), None, 64).multiple == 1
    world: Any = SimpleNamespace(device=torch.device("cuda"), size=1, rank=0)
    features: Any = SimpleNamespace(lengths=np.zeros(0))
    with pytest.raises(UserError, match="--eval_dtype int8 is for a CPU: give --no_cuda"):
        ClassificationTask(model, None, features, {}, ClassificationOptions(eval_dtype="int8"), world)  # type: ignore[arg-type]

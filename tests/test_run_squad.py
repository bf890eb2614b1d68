"""run_squad: the loss, training, choosing a checkpoint, predictions of several files, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Runner
from understanding_files import arguments, error_line, results, write_vocabulary

from minilm_fast.config import Config
from minilm_fast.data.answer_windows import Context, Window
from minilm_fast.modeling.question_answering import QuestionAnswerer, QuestionAnsweringBatch, span_losses
from minilm_fast.run_squad import main

RUN = {
    "max_seq_length": 22,
    "doc_stride": 8,
    "max_query_length": 6,
    "max_steps": 60,
    "save_steps": 30,
    "per_gpu_train_batch_size": 16,
    "per_gpu_eval_batch_size": 16,
    "learning_rate": 3e-3,
    "logging_steps": 20,
    "max_answer_length": 3,
    "peak_tflops": 0.1,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capfdbinary: Any) -> Runner:
    return Runner(capfdbinary)


def write_questions(path: Path, count: int, seed: int, *, negatives: bool = False) -> Path:
    """The answer is the one word from ``w80`` on; without one there is none."""
    rng = np.random.RandomState(seed)
    paragraphs = []
    for number in range(count):
        size = 30 if number % 12 == 5 else rng.randint(5, 12)
        words = [f"w{rng.randint(80)}" for _ in range(size)]
        place = rng.randint(1, len(words))
        words[place] = f"w{80 + rng.randint(2)}"
        impossible = negatives and number % 2 == 0
        answers = [{"text": words[place], "answer_start": len(" ".join(words[:place])) + 1}]
        if impossible:
            words[place] = "w1"
        question = {"id": f"{seed}-{number}", "question": "w91 w90", "answers": [] if impossible else answers}
        if negatives:
            question["is_impossible"] = impossible
        paragraphs.append({"context": " ".join(words), "qas": [question]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    return path


def command(folder: Path, **flags: object) -> list[str]:
    write_vocabulary(folder)
    return arguments(folder, **{**RUN, **flags})


def windows(lengths: list[int], seed: int = 0) -> list[Window]:
    rng = np.random.RandomState(seed)
    found = []
    for length in lengths:
        ids = rng.randint(5, 60, length).astype(np.int32)
        prefix = np.array([2, 7, 3], dtype=np.int32)
        span = tuple(sorted(rng.randint(3, 3 + length, 2).tolist()))
        context = Context("", ids, np.zeros((length, 2), dtype=np.int32))
        found.append(Window(0, prefix, context, 0, length, (span[0], span[1]), 3, 1))
    return found


@pytest.mark.parametrize("multiple", [1, 64])
def test_the_loss_is_that_of_transformers(multiple: int) -> None:
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64}
    torch.manual_seed(0)
    theirs: Any = transformers.BertForQuestionAnswering(transformers.BertConfig(**sizes)).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    ours = QuestionAnswerer.from_state(Config.from_dict(theirs.config.to_dict()), dict(theirs.state_dict())).eval()
    found = windows([9, 9, 9, 4])
    batch = QuestionAnsweringBatch.collate(found, multiple)
    assert batch.tokens.layout.total % multiple == 0 and batch.rows == sum(map(len, found))
    losses = span_losses(ours.span_logits(batch), batch)
    for part in (slice(0, 3), slice(3, 4)):
        # Of one length, since transformers lets padding take part in the softmax.
        own = found[part]
        outputs = theirs(
            input_ids=torch.tensor(np.stack([window.input_ids() for window in own])).long(),
            token_type_ids=torch.tensor(np.stack([window.token_type_ids() for window in own])).long(),
            start_positions=torch.tensor([window.span[0] for window in own]),
            end_positions=torch.tensor([window.span[1] for window in own]),
        )
        torch.testing.assert_close(losses[part].mean(), outputs.loss, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in ours.parameters())


def test_training_and_measuring(run: Runner, tmp_path: Path) -> None:
    import transformers

    write_questions(tmp_path / "data" / "train-v1.1.json", 300, 0)
    write_questions(tmp_path / "data" / "dev-v1.1.json", 60, 1)
    flags = {"do_train": True, "do_eval": True, "eval_all_checkpoints": True}
    outcome = run(main, *command(tmp_path, **flags))
    assert outcome.status == 0, outcome.err
    found = results(tmp_path / "out")
    assert set(found["checkpoints"]) == {"ckpt-30", "ckpt-60"}
    assert found["measures"]["f1"] > 80 and found["metric"] == "dev_f1"
    assert found["measures"]["f1"] == found["measures"]["dev_f1"] == max(
        each["dev_f1"] for each in found["checkpoints"].values()
    )  # fmt: skip
    predictions = json.loads((tmp_path / "out" / "predictions_.json").read_text())
    best = found["checkpoint"].removeprefix("ckpt-")
    assert predictions == json.loads((tmp_path / "out" / f"predictions_{best}.json").read_text())
    nbest = json.loads((tmp_path / "out" / "nbest_predictions_30.json").read_text())
    assert predictions.keys() == nbest.keys() and len(predictions) == 60
    assert not list((tmp_path / "out").glob("null_odds*"))
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    again = run(main, *command(tmp_path, do_eval=True, per_gpu_eval_batch_size=7))
    assert again.status == 0, again.err
    assert results(tmp_path / "out")["measures"]["f1"] == found["measures"]["f1"]


def test_questions_without_an_answer(run: Runner, tmp_path: Path) -> None:
    write_questions(tmp_path / "data" / "train-v2.0.json", 400, 0, negatives=True)
    write_questions(tmp_path / "data" / "dev-v2.0.json", 60, 1, negatives=True)
    flags = {"do_train": True, "do_eval": True, "version_2_with_negative": True, "evaluate_during_training": True}
    outcome = run(main, *command(tmp_path, **flags, max_steps=200, save_steps=100))
    assert outcome.status == 0, outcome.err
    measures = results(tmp_path / "out")["measures"]
    assert (measures["total"], measures["HasAns_total"], measures["NoAns_total"]) == (60, 30, 30)
    assert measures["best_f1"] >= measures["f1"] > 70
    predictions = json.loads((tmp_path / "out" / "predictions_.json").read_text())
    odds = json.loads((tmp_path / "out" / "null_odds_.json").read_text())
    assert {name for name, text in predictions.items() if not text} == {name for name, odd in odds.items() if odd > 0}


def test_several_files(run: Runner, tmp_path: Path) -> None:
    for number, language in enumerate(("en", "de")):
        write_questions(tmp_path / "data" / f"test-context-{language}-question-{language}.json", 20, 5 + number)
    write_questions(tmp_path / "data" / "train.json", 60, 0)
    flags = {"train_file": "train.json", "predict_file": "test-*.json", "do_train": True, "do_eval": True}
    outcome = run(main, *command(tmp_path, **flags, max_steps=4))
    assert outcome.status == 0, outcome.err
    measures = results(tmp_path / "out")["measures"]
    assert measures["average_f1"] == pytest.approx((measures["de_f1"] + measures["en_f1"]) / 2) == measures["dev_f1"]
    assert outcome.out == (tmp_path / "out" / "qa_table.txt").read_text()
    assert outcome.out.splitlines()[0].replace(" ", "") == "||Average|de|en|"
    for language in ("en", "de"):
        assert len(json.loads((tmp_path / "out" / f"predictions_{language}.json").read_text())) == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nothing to do: give --do_train, --do_eval or --do_predict"),
        ({"do_eval": True, "data_dir": None}, "give --predict_file or --data_dir"),
        ({"do_train": True, "data_dir": None}, "--do_train needs --train_file or --data_dir"),
        ({"do_train": True, "train_file": "absent.json"}, "data/absent.json: no such file"),
        ({"do_eval": True, "predict_file": "absent-*.json"}, "--predict_file absent-*.json: no such file"),
        ({"do_eval": True, "dev_file": "absent.json"}, "absent.json: no such file"),
        ({"do_eval": True, "answer_language": "fr"}, "--answer_language: 'fr' is not a language of MLQA"),
        ({"do_eval": True, "predict_file": "test-context-xx-question-en.json"}, "'xx' is not a language of MLQA"),
        (
            {"do_eval": True, "max_seq_length": 10},
            "--max_seq_length 10 leaves no room for the context beside a question of --max_query_length 6 tokens",
        ),
        ({"do_eval": True, "doc_stride": 20}, "--doc_stride 20 passes over a part of the context"),
        ({"do_eval": True, "max_seq_length": 999}, "--max_seq_length 999"),
        ({"do_eval": True, "predict_file": "negative.json"}, "has no answer; give --version_2_with_negative"),
    ],
)
def test_what_is_wrong(flags: dict[str, object], message: str, run: Runner, tmp_path: Path) -> None:
    write_questions(tmp_path / "data" / "dev-v1.1.json", 8, 1)
    write_questions(tmp_path / "data" / "test-context-xx-question-en.json", 2, 2)
    write_questions(tmp_path / "data" / "negative.json", 8, 1, negatives=True)
    assert message in error_line(run(main, *command(tmp_path, **flags)))
    assert not list((tmp_path / "out").glob("*.json"))

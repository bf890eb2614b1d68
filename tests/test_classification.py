"""Sequence classification: GLUE's files, the head against transformers', metrics, training and resume."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.classification import ClassificationFeature, TextExample, make_classification_features
from minilm_fast.data.glue import read_glue
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.classification import ClassificationBatch, SequenceClassifier
from minilm_fast.modeling.heads import HeadInput
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.checkpointing import run_folder
from minilm_fast.training.classification import ClassificationModule, ClassificationOptions, ClassificationTask
from minilm_fast.training.distributed import World
from minilm_fast.training.loop import LoopOptions, Trainer

TEACHER = Path(__file__).parent / "goldens" / "distillation" / "teacher"
WORDS = [f"w{i}" for i in range(92)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return Tokenizer.from_pretrained(path)


FILES = {
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n", ("a", "b"), 1),
    "mrpc": ('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\ta "b\tc\n', ('a "b', "c"), 1),
    "sst-2": ("sentence\tlabel\na b \t0\n", ("a b ",), 0),
    "cola": ("gj04\t1\t\ta b.\n", ("a b.",), 1),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n", ("a", "b"), 0),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tcontradiction\n", ("a", "b"), 0),
    "QQP": ("id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n", ("a", "b"), 1),
}


@pytest.mark.parametrize("task", FILES)
def test_files_of_glue(task: str, tmp_path: Path) -> None:
    content, texts, label = FILES[task]
    (tmp_path / "a.tsv").write_text(content)
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(content.encode()))
    assert read_glue(tmp_path / "a.tsv", task) == [TextExample(texts, label)] == read_glue(tmp_path / "a.tsv.gz", task)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("rte", "index\tsentence1\tlabel\n", r"a.tsv:1: no column 'sentence2'"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n", r"a.tsv:2: the label 'maybe' is not one of"),
        ("sst-2", "sentence\tlabel\n", "holds no examples"),
        ("sst-2", "", "holds no examples"),
        ("sts-b", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "a.tsv:2: the score '5.1' is not a number from 0 to 5"),
        ("stsb", "", "task 'stsb' is not one of"),
    ],
)
def test_files_that_are_wrong(task: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_glue(tmp_path / "a.tsv", task)


def test_short_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na\nb\t1\n")
    with pytest.warns(UserWarning, match=r"1 line has too few columns, passed over \(the first: line 2\)"):
        assert read_glue(tmp_path / "a.tsv", "sst-2") == [TextExample(("b",), 1)]


def test_features(tokenizer: Tokenizer) -> None:
    examples = [TextExample(("w0 w1 w2 w3", "w4 w5"), 1), TextExample(("w0 w1 w2 w3 w4 w5 w6 w7",), 0)]
    pair, single = make_classification_features(examples, tokenizer, 8)
    assert pair.input_ids.tolist() == [2, 5, 6, 7, 3, 9, 10, 3] and pair.first == 5
    assert single.input_ids.tolist() == [2, 5, 6, 7, 8, 9, 10, 3] and single.first == 8
    assert (pair.label, single.label) == (1, 0)
    untyped = make_classification_features(examples, tokenizer, 8, token_types=False)
    assert [feature.first for feature in untyped] == [8, 8]
    batch = ClassificationBatch.collate([pair, single], multiple=20)
    assert batch.tokens.layout.cu_seqlens.tolist() == [0, 8, 16, 20] and batch.labels.tolist() == [1, 0]
    assert batch.token_type_ids.tolist() == [0] * 5 + [1] * 3 + [0] * 12


def test_longer_texts_are_cut_first(tokenizer: Tokenizer) -> None:
    """As one token after the other is taken from the longer text, or from the second of equal ones."""
    for first in range(1, 9):
        for second in range(1, 9):
            parts = [list(range(first)), list(range(second))]
            while sum(map(len, parts)) > 6:
                max(reversed(parts), key=len).pop()
            texts = tuple(" ".join(f"w{i}" for i in range(n)) for n in (first, second))
            [feature] = make_classification_features([TextExample(texts, 0)], tokenizer, 9)
            assert (feature.first - 2, len(feature.input_ids) - feature.first - 1) == tuple(map(len, parts))


LAST_LAYER = [
    (f"bert.encoder.layer.1.{name}", f"encoder.layer.1.{name}")
    for name in ("attention.self.query", "attention.self.value", "attention.output.dense", "output.dense")
]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """Also after our own saving: transformers loads it with the same logits."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 3}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.3}
    sizes |= {"embedding_size": 24} if family == "Electra" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    theirs: Any = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load(tmp_path / "theirs", fold_token_types=True)
    ours = SequenceClassifier.from_state(loaded.config, {**loaded.state, **loaded.extra_state}, 3).eval()
    ids, mask = torch.randint(5, 60, (3, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])
    types = torch.zeros_like(ids)
    if family != "Roberta":
        types[:, 3:] = 1
    inputs = {"input_ids": torch.where(mask.bool(), ids, config.pad_token_id), "attention_mask": mask}
    with torch.no_grad():
        expected = theirs(**inputs, token_type_ids=types).logits
    features = make_features(ids, mask, types)
    with torch.no_grad():
        logits = ours(features.tokens, token_type_ids=features.token_type_ids)
        torch.testing.assert_close(logits[:3], expected, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([2, 0, 1])
    theirs(**inputs, token_type_ids=types, labels=labels).loss.backward()
    ClassificationModule(ours)(dataclasses.replace(features, labels=labels)).backward()
    for own, other in (("bert.embeddings.LayerNorm", "embeddings.LayerNorm"), *LAST_LAYER):
        gradient = theirs.base_model.get_submodule(other).weight.grad
        torch.testing.assert_close(ours.get_submodule(own).weight.grad, gradient, rtol=1e-3, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again: Any = type(theirs).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs, token_type_ids=types).logits, expected, rtol=1e-5, atol=1e-6)


def test_only_the_first_tokens_go_through_the_last_layer() -> None:
    """With relative positions too, which depend on the positions and not on the order in memory."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = Config(**sizes, intermediate_size=32, rel_pos_bins=8, max_rel_pos=6, initializer_range=0.3)
    model = SequenceClassifier(config).eval()
    tokens = TokenBatch.from_sequences([list(range(5, 5 + n)) for n in (7, 1, 4)])
    types = torch.arange(12, dtype=torch.int32) % 2
    everything = HeadInput.from_packed(config, tokens, types)
    with torch.no_grad():
        first = model.encode(everything)[[0, 7, 8]]
        torch.testing.assert_close(model.encode(model.read(tokens, None, types, None)), first, rtol=1e-5, atol=1e-6)


def make_features(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> ClassificationBatch:
    """With idle tokens, which must change nothing."""
    rows = ((i[m.bool()].numpy(), int((t[m.bool()] == 0).sum())) for i, m, t in zip(ids, mask, types, strict=True))
    return ClassificationBatch.collate([ClassificationFeature(ids, first, 0) for ids, first in rows], multiple=64)


def make_trainer(folder: Path, tokenizer: Tokenizer, steps: int = 40) -> Trainer:
    """Label 1 has the words from w30 on."""
    rng = np.random.RandomState(0)
    examples = []
    for i in range(300):
        words = [f"w{30 * (i % 2) + rng.randint(30)}" for _ in range(rng.randint(2, 10))]
        examples.append(TextExample((" ".join(words),), i % 2))
    features, dev = (make_classification_features(part, tokenizer, 20) for part in (examples[:240], examples[240:]))
    torch.manual_seed(0)
    loaded = checkpoint.load(TEACHER, for_training=True)
    config = loaded.config.replace(hidden_dropout_prob=0.1)
    model = SequenceClassifier.from_state(config, loaded.state, 2)
    options = ClassificationOptions(16, metrics=("accuracy", "f1", "matthews"))
    world = World({}, cuda=False)
    task = ClassificationTask(model, tokenizer, features, {"": dev}, options, world)
    loop = LoopOptions(
        steps,
        learning_rate=3e-3,
        save_steps=20,
        logging_steps=20,
        peak_tflops=0.1,
        metric_for_best_model="dev_accuracy",
    )
    return Trainer(task, loop, folder, world)


def run(trainer: Trainer) -> list[dict[str, float]]:
    with run_folder(trainer.world, trainer.output_dir) as folder:
        trainer.prepare(folder)
        trainer.train()
    return json.loads((trainer.output_dir / "history.json").read_text())["records"]


def test_training_learns_and_resumes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = run(make_trainer(tmp_path / "whole", tokenizer))
    assert [record["step"] for record in records] == [20, 40]
    assert records[-1]["dev_accuracy"] >= 0.9 and records[-1]["dev_loss"] < 0.5
    assert {"dev_f1", "dev_matthews"} <= records[-1].keys()
    run(make_trainer(tmp_path / "broken", tokenizer))
    shutil.rmtree(tmp_path / "broken" / "ckpt-40")
    run(make_trainer(tmp_path / "broken", tokenizer))
    one, two = (checkpoint.load(tmp_path / name / "ckpt-40") for name in ("whole", "broken"))
    for name, tensor in {**one.state, **one.extra_state}.items():
        assert torch.equal(tensor, {**two.state, **two.extra_state}[name]), name
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "ckpt-40").eval()
    ids = tokenizer.encode("w33 w40 w57")
    with torch.no_grad():
        assert model(torch.tensor([[2, *ids, 3]])).logits.argmax().item() == 1

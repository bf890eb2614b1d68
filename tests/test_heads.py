"""Heads on the encoder: logits equal to transformers' for every head and layout, loading, saving, wrong input."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import minilm_fast
from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.errors import UserError
from minilm_fast.modeling.heads import HeadModel
from minilm_fast.modeling.inference import InferenceEngine

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Electra")
HEADS = ("SequenceClassifier", "TokenClassifier", "MultipleChoice", "QuestionAnswerer", "MaskedLM", "CausalLM")
CASES = [(name, family) for name in HEADS for family in FAMILIES]
CASES += [("NextSentencePredictor", "Bert"), ("PreTraining", "Bert"), ("ReplacedTokenDetector", "Electra")]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 30,
}
LENGTH = 9
MASKS = {
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8, [1] * 9],
    "holes": [[1, 0] * 4 + [1], [1] * 3 + [0] * 3 + [1] * 3, [1] * 9, [1] * 8 + [0]],
}


def their_name(family: str, head: type[HeadModel]) -> str:
    return {"BertForCausalLM": "BertLMHeadModel"}.get(family + head.suffix, family + head.suffix)


def make_theirs(family: str, head: type[HeadModel], **changes: Any) -> Any:
    """A model of transformers all of whose weights, the token types' of RoBERTa too, are random."""
    import transformers

    sizes = {**SIZES, "num_labels": 2 if head.suffix == "ForQuestionAnswering" else 3, **changes}
    if family == "Electra":
        sizes.setdefault("embedding_size", 16)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, is_decoder=head.causal)
    model: Any = getattr(transformers, their_name(family, head))(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def make_inputs(family: str, head: type[HeadModel], masks: list[list[int]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor(masks)
    ids = torch.where(mask.bool(), torch.randint(5, 60, mask.shape), 1 if "oberta" in family else 0)
    types = torch.zeros_like(ids)
    if "oberta" not in family:
        types[:, 4:] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if head.suffix == "ForMultipleChoice":
        return {name: tensor.view(2, 2, LENGTH) for name, tensor in inputs.items()}
    return inputs


def their_logits(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    output = model(**inputs)
    if "seq_relationship_logits" in output:
        return output.prediction_logits, output.seq_relationship_logits
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def of_tokens(logits: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """All logits, without padding where they are those of tokens."""
    parts = logits if isinstance(logits, tuple) else (logits,)
    return [part[mask.bool()] if part.shape[:2] == mask.shape else part for part in parts]


def at_padding(logits: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    parts = logits if isinstance(logits, tuple) else (logits,)
    return [part[~mask.bool()] for part in parts if part.shape[:2] == mask.shape]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("name", "family"), CASES)
@torch.no_grad()
def test_logits_equal_transformers_both_ways(name: str, family: str, masks: str, tmp_path: Path) -> None:
    head = getattr(minilm_fast, name)
    theirs = make_theirs(family, head)
    inputs = make_inputs(family, head, MASKS[masks])
    mask = inputs["attention_mask"]
    expected = of_tokens(their_logits(theirs, inputs), mask)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = head.from_pretrained(tmp_path / "theirs").eval()
    assert not ours.newly_initialised
    found = ours(**inputs)
    torch.testing.assert_close(of_tokens(found, mask), expected, rtol=1e-5, atol=1e-5)
    assert not any(part.any() for part in at_padding(found, mask))

    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["architectures"] == [their_name(family, head)]
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(of_tokens(their_logits(again.eval(), inputs), mask), expected, rtol=1e-5, atol=1e-5)
    if head.labelled:
        assert again.config.num_labels == 3


@pytest.mark.parametrize(("name", "family"), [case for case in CASES if case[0] not in HEADS or case[1] == "Bert"])
@torch.no_grad()
def test_packed_input_gives_the_same(name: str, family: str, tmp_path: Path) -> None:
    head = getattr(minilm_fast, name)
    make_theirs(family, head).save_pretrained(tmp_path)
    ours = head.from_pretrained(tmp_path).eval()
    inputs = make_inputs(family, head, MASKS["right"])
    ids, mask, types = (x.reshape(-1, LENGTH) for x in inputs.values())
    batch = TokenBatch.from_sequences([row[kept.bool()].numpy() for row, kept in zip(ids, mask, strict=True)])
    extra = {"choices": 2} if name == "MultipleChoice" else {}
    found = ours(batch, token_type_ids=types[mask.bool()].int(), **extra)
    parts = list(found) if isinstance(found, tuple) else [found]
    torch.testing.assert_close(parts, of_tokens(ours(**inputs), mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["TokenClassifier", "QuestionAnswerer"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@torch.no_grad()
def test_left_padding_counts_positions_as_transformers_does(name: str, family: str, tmp_path: Path) -> None:
    head = getattr(minilm_fast, name)
    theirs = make_theirs(family, head)
    theirs.save_pretrained(tmp_path)
    inputs = make_inputs(family, head, [[0] * 4 + [1] * 5, [1] * 9])
    mask = inputs["attention_mask"].bool()
    found = head.from_pretrained(tmp_path).eval()(**inputs)
    torch.testing.assert_close(found[mask], their_logits(theirs, inputs)[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["TokenClassifier", "MaskedLM"])
def test_gradients_equal_transformers(name: str, family: str, tmp_path: Path) -> None:
    """Also those of ELECTRA's narrow embeddings."""
    head = getattr(minilm_fast, name)
    theirs = make_theirs(family, head)
    theirs.save_pretrained(tmp_path)
    ours = head.from_pretrained(tmp_path).eval()
    inputs = make_inputs(family, head, MASKS["right"])
    torch.manual_seed(2)
    labels = torch.where(inputs["attention_mask"].bool(), torch.randint(0, 3, (4, LENGTH)), -100)
    logits = ours(**inputs)
    if name == "TokenClassifier":
        loss = ours.loss(logits, labels)
        tokens = inputs["attention_mask"].bool()
    else:
        tokens = labels >= 0
        batch = ours.read(*inputs.values(), None)
        loss = ours.masked_loss(batch, torch.arange(int(tokens.sum())), labels[tokens])
    expected = theirs(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(F.cross_entropy(logits[tokens], labels[tokens]), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    prefix = theirs.base_model_prefix
    gradients = {n.replace(f"{prefix}.", "bert.", 1): p.grad for n, p in theirs.named_parameters()}
    checked = 0
    for parameter, tensor in ours.named_parameters():
        other = gradients.get(parameter)
        if other is None or tensor.grad is None or tensor.shape != other.shape:
            continue
        torch.testing.assert_close(tensor.grad, other, rtol=1e-4, atol=1e-6 * max(1.0, other.abs().max().item()))
        checked += 1
    assert checked >= 30
    assert (family == "Electra") == ("bert.embeddings_project.weight" in gradients)


@pytest.mark.parametrize("name", ["tiny", "tiny_relpos"])
@torch.no_grad()
def test_layouts_of_the_original(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MiniLM's and UniLM's files have no such head: it starts afresh, is reported, and saves and loads."""
    with caplog.at_level(logging.WARNING):
        model = minilm_fast.SequenceClassifier.from_pretrained(
            GOLDENS / name, label_names=["no", "yes", "maybe"]
        ).eval()
    fresh = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert set(model.newly_initialised) == fresh and "newly initialised: bert.pooler.dense" in caplog.text
    ids = torch.randint(5, 90, (2, 7))
    model.save_pretrained(tmp_path)
    again = minilm_fast.SequenceClassifier.from_pretrained(tmp_path).eval()
    assert not again.newly_initialised and again.labels == ["no", "yes", "maybe"]
    assert torch.equal(again(ids), model(ids)) and model(ids).shape == (2, 3)


def test_labels_and_problem_type_survive(tmp_path: Path) -> None:
    import transformers

    theirs = make_theirs("Bert", minilm_fast.TokenClassifier)
    theirs.config.id2label = {0: "O", 1: "B-PER", 2: "I-PER"}
    theirs.config.label2id = {"O": 0, "B-PER": 1, "I-PER": 2}
    theirs.config.problem_type = "multi_label_classification"
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minilm_fast.TokenClassifier.from_pretrained(tmp_path / "theirs")
    assert ours.labels == ["O", "B-PER", "I-PER"]
    ours.save_pretrained(tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    for key in ("id2label", "label2id", "num_labels", "problem_type"):
        assert getattr(config, key) == getattr(theirs.config, key)
    named = minilm_fast.TokenClassifier.from_pretrained(tmp_path / "theirs", label_names=["a", "b"])
    assert named.labels == ["a", "b"] and named.newly_initialised == ["classifier.weight", "classifier.bias"]
    assert named.config.extra["label2id"] == {"a": 0, "b": 1}
    fewer = minilm_fast.TokenClassifier.from_pretrained(tmp_path / "theirs", num_labels=5)
    assert fewer.labels == [f"LABEL_{i}" for i in range(5)]


def test_dropout_of_the_classifier_is_the_configurations(tmp_path: Path) -> None:
    make_theirs("Bert", minilm_fast.TokenClassifier, classifier_dropout=0.4).save_pretrained(tmp_path)
    model: Any = minilm_fast.TokenClassifier.from_pretrained(tmp_path)
    assert model.dropout.p == 0.4
    config = Config.from_file(tmp_path)
    wrong = config.replace(extra={**config.extra, "classifier_dropout": 2})
    with pytest.raises(UserError, match="classifier_dropout must be at least 0 and below 1"):
        minilm_fast.TokenClassifier(wrong)


def make_small(name: str, **changes: Any) -> Any:
    return getattr(minilm_fast, name)(Config.from_dict({**SIZES, **changes})).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, r"input_ids must be \[batch, length\]"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[2, 5\] like input_ids, got \[2, 4\]"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "row 1 has no token"),
        ({"input_ids": torch.ones(1, 31, dtype=torch.int64)}, "position 30 is outside the model's 30 positions"),
        ({"position_ids": torch.full((2, 5), 99)}, "position 99 is outside"),
        ({"position_ids": torch.full((2, 5), -1)}, "position -1 is outside"),
    ],
)
def test_wrong_input(changes: dict[str, torch.Tensor], message: str) -> None:
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), **changes}
    with pytest.raises(UserError, match=message):
        make_small("TokenClassifier")(**inputs)


def test_wrong_packed_input() -> None:
    batch = TokenBatch.from_sequences([[5] * 31])
    with pytest.raises(UserError, match="31 tokens is longer than the model's 30 positions"):
        make_small("TokenClassifier")(batch)
    with pytest.raises(UserError, match="no attention_mask"):
        make_small("TokenClassifier")(batch, torch.ones(1, 31))
    three = TokenBatch.from_sequences([[5], [6], [7]])
    for choices in (None, 2, 0):
        with pytest.raises(UserError, match="3 sequences cannot be"):
            make_small("MultipleChoice")(three, choices=choices)
    with pytest.raises(UserError, match=r"\[questions, choices, length\]"):
        make_small("MultipleChoice")(torch.ones(2, 5, dtype=torch.int64))


def test_padding_token_of_roberta_inside_a_sequence() -> None:
    model = make_small("TokenClassifier", model_type="roberta")
    ids = torch.tensor([[5, 1, 6]])
    with pytest.raises(UserError, match="holds the padding token 1"):
        model(ids)


def test_wrong_labels(tmp_path: Path) -> None:
    head = minilm_fast.TokenClassifier
    make_theirs("Bert", head).save_pretrained(tmp_path)
    for options, message in (
        ({"num_labels": 0}, "num_labels must be positive"),
        ({"num_labels": 3, "label_names": ["a"]}, "1 labels are named"),
        ({"problem_type": "guess"}, "problem_type 'guess' is not one of"),
    ):
        with pytest.raises(UserError, match=message):
            head.from_pretrained(tmp_path, **options)
    with pytest.raises(UserError, match="MultipleChoice has no labels to choose"):
        minilm_fast.MultipleChoice.from_pretrained(tmp_path, num_labels=2)
    raw = json.loads((tmp_path / "config.json").read_text())
    for labels, message in (
        ({"0": "a", "1": "b"}, "give num_labels to start afresh"),
        ({"1": "a", "2": "b"}, "must number its labels from 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "id2label": labels}))
        with pytest.raises(UserError, match=message) as error:
            head.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "id2label": None, "num_labels": 10**12}))
    with pytest.raises(UserError, match="num_labels must be a number from 1 to"):
        head.from_pretrained(tmp_path)


def test_a_head_that_is_not_finite() -> None:
    state = make_small("TokenClassifier").state_dict()
    state["classifier.bias"][1] = float("nan")
    with pytest.raises(UserError, match=r"classifier\.bias holds NaN"):
        minilm_fast.TokenClassifier.from_state(make_small("TokenClassifier").config, state)


def test_a_part_of_the_encoder_is_missing(tmp_path: Path) -> None:
    loaded = checkpoint.load(GOLDENS / "tiny")
    state = {k: v for k, v in loaded.state.items() if not k.endswith("layer.0.output.dense.bias")}
    with pytest.raises(UserError, match=r"the checkpoint has no bert\.encoder\.layer\.0\.output\.dense\.bias of shape"):
        minilm_fast.TokenClassifier.from_state(loaded.config, state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["PreTraining", "NextSentencePredictor", "ReplacedTokenDetector", "CausalLM"])
def test_losses_equal_transformers(name: str, tied: bool, tmp_path: Path) -> None:
    head = getattr(minilm_fast, name)
    family = "Electra" if name == "ReplacedTokenDetector" else "Bert"
    theirs = make_theirs(family, head, tie_word_embeddings=tied, hidden_act="gelu" if tied else "relu")
    theirs.save_pretrained(tmp_path / "theirs")
    head.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    ours = head.from_pretrained(tmp_path / "ours").eval()
    inputs = make_inputs(family, head, MASKS["right"])
    tokens = inputs["attention_mask"].bool()
    batch = ours.read(*inputs.values(), None)
    torch.manual_seed(2)
    words = torch.where(tokens, torch.randint(0, 60, tokens.shape), -100)
    kind = torch.tensor([0, 1, 1, 0])
    if name == "PreTraining":
        every = torch.arange(int(tokens.sum()))
        loss, labels = (
            ours.pretraining_loss(batch, every, words[tokens], kind),
            {"labels": words, "next_sentence_label": kind},
        )
    elif name == "NextSentencePredictor":
        loss, labels = ours.loss(ours(**inputs), kind), {"labels": kind}
    elif name == "ReplacedTokenDetector":
        replaced = words % 2
        loss, labels = ours.loss(ours(**inputs), replaced, inputs["attention_mask"]), {"labels": replaced}
    else:
        loss, labels = (
            ours.causal_loss(batch),
            {"labels": torch.where(tokens, inputs["input_ids"], -100)},
        )
    expected = theirs(**inputs, **labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    found = ours.bert.embeddings.word_embeddings.weight.grad
    other = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6 * max(1.0, other.abs().max().item()))


def test_heads_of_other_families(tmp_path: Path) -> None:
    make_theirs("Roberta", minilm_fast.MaskedLM).save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match="PreTraining is a head of bert, minilm, unilm, not of roberta"):
        minilm_fast.PreTraining.from_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match="ReplacedTokenDetector is a head of electra, not of bert"):
        make_small("ReplacedTokenDetector")
    make_theirs("Bert", minilm_fast.CausalLM).save_pretrained(tmp_path / "causal")
    with pytest.raises(UserError, match="is_decoder is set, and MaskedLM is bidirectional; load CausalLM"):
        minilm_fast.MaskedLM.from_pretrained(tmp_path / "causal")
    with pytest.raises(UserError, match="add_cross_attention is set"):
        make_small("CausalLM", add_cross_attention=True)


def test_every_head_of_transformers_has_one_here() -> None:
    """Of the four families; cross-attention and generation aside."""
    import importlib
    import inspect

    ours = {their_name(family, getattr(minilm_fast, name)) for name, family in CASES}
    theirs = set()
    for module in ("bert", "roberta", "xlm_roberta", "electra"):
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        theirs |= {
            name
            for name, kind in inspect.getmembers(found, inspect.isclass)
            if kind.__module__ == found.__name__ and ("For" in name or name.endswith("LMHeadModel"))
        }
    theirs = {name for name in theirs if not name.endswith("Output")}
    assert len(theirs) >= 25 and theirs == ours


def test_summary_that_electra_does_not_have() -> None:
    with pytest.raises(UserError, match="summary_type 'mean' is not supported"):
        make_small("MultipleChoice", model_type="electra", summary_type="mean")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_activation_of_the_masked_lm_head(family: str, tmp_path: Path) -> None:
    """``hidden_act`` for BERT, always GELU for the others; in the network and in what decodes."""
    theirs = make_theirs(family, minilm_fast.MaskedLM, hidden_act="relu")
    theirs.save_pretrained(tmp_path)
    inputs = make_inputs(family, minilm_fast.MaskedLM, MASKS["right"])
    tokens = inputs["attention_mask"].bool()
    output = theirs(**inputs, output_hidden_states=True)
    found = minilm_fast.MaskedLM.from_pretrained(tmp_path).eval()(**inputs)
    torch.testing.assert_close(found[tokens], output.logits[tokens], rtol=1e-5, atol=1e-5)
    loaded = checkpoint.load(tmp_path, fold_token_types=True)
    engine = InferenceEngine(loaded.config, loaded.state)
    scores, ids = engine.predict(output.hidden_states[-1][tokens], SIZES["vocab_size"])
    expected = output.logits[tokens].log_softmax(-1)
    torch.testing.assert_close(scores, expected.gather(1, ids.long()), rtol=1e-4, atol=1e-3)

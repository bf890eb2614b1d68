"""The trainable network against the original's losses, gradients, masks and hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.batching import PackedBatch, collate
from minilm_fast.data.masking import Sample
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import relative_position_bucket
from minilm_fast.modeling.seq2seq import Seq2SeqModel
from minilm_fast.ops import backend
from minilm_fast.ops.layout import SequenceLayout

GOLDENS = Path(__file__).parent / "goldens"
# None: the best there is, which is the C++ kernels where they were built.
BACKENDS = ("reference", None)


def _golden(name: str) -> Any:
    return json.loads((GOLDENS / "train" / name).read_text())


INPUTS = _golden("inputs.json")


def _sample(way: str, i: int) -> Sample:
    fields = INPUTS["inputs"][way]
    source, target = fields["num_source_tokens"][i], fields["num_target_tokens"][i]
    head = (fields["source_ids"][i][:source], fields["target_ids"][i][:target])
    if way == "v2":
        return Sample(*head, fields["pseudo_ids"][i][:target], list(range(target)), fields["label_ids"][i][:target])
    count = sum(fields["masked_weights"][i])
    return Sample(*head, [], fields["masked_pos"][i][:count], fields["masked_ids"][i][:count])


def _batch(way: str) -> PackedBatch:
    return collate([_sample(way, i) for i in range(len(INPUTS["example_indices"]))])


def _model(case: dict) -> Seq2SeqModel:
    loaded = checkpoint.load(GOLDENS / case["model"], for_training=True)
    changes: dict = {"label_smoothing": case["label_smoothing"]}
    if case["variant"] == "type45":
        changes |= {"source_type_id": 4, "target_type_id": 5}
    elif case["variant"] == "type0":
        changes |= {"type_vocab_size": 0}
    elif case["variant"] == "base_fix_word_embedding":
        changes |= {"fix_word_embedding": True}
    return Seq2SeqModel.from_state(loaded.config.replace(**changes), loaded.state).eval()


LOSS_CASES = _golden("loss_and_grads.json")
CASE_IDS = [f"{c['variant']}-{c['mask_way']}-{c['label_smoothing']}" for c in LOSS_CASES]


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("case", LOSS_CASES, ids=CASE_IDS)
def test_loss_and_gradients_equal_the_original(case: dict, backend_name: str | None) -> None:
    model = _model(case)
    with backend(backend_name):
        loss = model(_batch(case["mask_way"]))
        loss.backward()
    assert loss.item() == pytest.approx(float(case["loss_repr"]), rel=1e-5)
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert grads.keys() == {expected["name"] for expected in case["grads"]}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert norm == pytest.approx(case["total_grad_norm"], rel=1e-4)
    for expected in case["grads"]:
        grad = grads[expected["name"]]
        tolerance = 1e-4 * expected["l2"] + 1e-6
        assert list(grad.shape) == expected["shape"]
        assert grad.norm().item() == pytest.approx(expected["l2"], abs=tolerance)
        assert grad.sum().item() == pytest.approx(expected["sum"], abs=10 * tolerance)
        torch.testing.assert_close(grad.flatten()[:8], torch.tensor(expected["first8"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_every_gradient_equals_the_original(backend_name: str | None) -> None:
    model = _model(LOSS_CASES[0])
    with backend(backend_name):
        model(_batch("v2")).backward()
    expected = load_file(GOLDENS / "train" / "grads_base_v2_ls0.1.safetensors")
    found = {name: param.grad for name, param in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(("file", "variant"), [("forward_base_v0", "base"), ("forward_relpos_v2", "relpos")])
def test_hidden_states_equal_the_original(file: str, variant: str, backend_name: str | None) -> None:
    way = file[-2:]
    case = next(c for c in LOSS_CASES if c["variant"] == variant and c["mask_way"] == way)
    model, batch = _model(case), _batch(way)
    expected = load_file(GOLDENS / "train" / f"{file}.safetensors")
    with torch.no_grad(), backend(backend_name):
        embedded, *_, last = model.bert.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
        hidden = last[batch.predicted]
        logits = model.logits(hidden)
    starts = {
        "source": 0,
        "target": INPUTS["max_source_len"],
        "pseudo": INPUTS["max_source_len"] + INPUTS["max_target_len"],
    }
    token = row = 0
    for i in range(len(INPUTS["example_indices"])):
        sample = _sample(way, i)
        for part, start in starts.items():
            count = len(getattr(sample, part))
            rows = expected["embedding_output"][i, start : start + count]
            torch.testing.assert_close(embedded[token : token + count], rows, rtol=1e-5, atol=1e-5)
            token += count
        count = len(sample.labels)
        for found, name in ((hidden, "last_hidden_at_predicted_positions"), (logits, "logits_at_predicted_positions")):
            torch.testing.assert_close(found[row : row + count], expected[name][i, :count], rtol=1e-4, atol=1e-4)
        row += count
    assert token == batch.tokens and row == batch.labels.numel()


@pytest.mark.parametrize("way", ["v0", "v1", "v2"])
def test_masks_equal_the_original(way: str) -> None:
    mask = _batch(way).layout.dense_mask()
    for i, expected in enumerate(_golden("attention_masks.json")[way]):
        sample = _sample(way, i)
        # The original pads each of the three parts, we put them one after the other.
        start = (0, INPUTS["max_source_len"], INPUTS["max_source_len"] + INPUTS["max_target_len"])
        counts = (len(sample.source), len(sample.target), len(sample.pseudo))
        where = [at + j for at, count in zip(start, counts, strict=True) for j in range(count)]
        original = torch.tensor([[int(c) for c in row] for row in expected.split("|")], dtype=torch.bool)
        assert torch.equal(mask[i, : len(where), : len(where)], original[where][:, where])


@pytest.mark.parametrize("case", _golden("relative_position_buckets.json"), ids=lambda c: str(c["num_buckets"]))
def test_relative_position_buckets(case: dict) -> None:
    start = case["relative_position_from"]
    distance = torch.arange(start, start + len(case["buckets"]))
    found = relative_position_bucket(distance, case["num_buckets"], case["max_distance"])
    assert found.tolist() == case["buckets"]


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_bf16_autocast_is_close(backend_name: str | None) -> None:
    case = LOSS_CASES[0]
    model = _model(case)
    with torch.autocast("cpu", dtype=torch.bfloat16), backend(backend_name):
        loss = model(_batch("v2"))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(case["loss_repr"]), rel=2e-2)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(case["total_grad_norm"], rel=5e-2)


def test_a_row_is_the_same_whatever_else_is_asked_for() -> None:
    model, batch = _model(LOSS_CASES[0]), _batch("v2")
    with torch.no_grad():
        some = model.bert(batch.input_ids, batch.position_ids, batch.layout)
        every = model.bert(batch.input_ids, batch.position_ids, batch.layout.without_queries())
    torch.testing.assert_close(some, every[batch.layout.query_index()], rtol=1e-5, atol=1e-5)


def test_a_sequence_is_the_same_whatever_is_beside_it() -> None:
    model, batch = _model(LOSS_CASES[6]), _batch("v2")
    with torch.no_grad():
        together = model.losses(batch)
        alone = torch.cat([model.losses(collate([_sample("v2", i)])) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [LOSS_CASES[0], LOSS_CASES[6]], ids=["base", "relpos"])
def test_gradient_checkpointing_changes_nothing(case: dict) -> None:
    batch, gradients = _batch("v2"), []
    for checkpointing in (False, True):
        model = _model(case).train()
        model.bert.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model(batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_dropout_is_on_in_training_only_and_follows_the_seed() -> None:
    model, batch = _model(LOSS_CASES[0]), _batch("v2")
    losses = []
    for seed, training in ((1, True), (1, True), (2, True), (2, False), (1, False)):
        torch.manual_seed(seed)
        losses.append(model.train(training)(batch).item())
    assert losses[0] == losses[1] != losses[2] and losses[3] == losses[4]


@pytest.mark.parametrize("name", ["tiny", "tiny_relpos"])
def test_backends_agree_with_dropout(name: str) -> None:
    case = next(c for c in LOSS_CASES if c["model"] == name)
    batch, gradients = _batch("v2"), []
    for backend_name in BACKENDS:
        model = _model(case).train()
        torch.manual_seed(1)
        with backend(backend_name):
            model(batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for parameter, gradient in gradients[0].items():
        bound = 1e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(gradients[-1][parameter], gradient, rtol=1e-3, atol=bound)


@pytest.mark.parametrize("way", ["v0", "v1", "v2"])
def test_filler_changes_nothing(way: str) -> None:
    model = _model(LOSS_CASES[0])
    samples = [_sample(way, i) for i in range(6)]
    model(collate(samples)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(collate(samples, 64)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_normalizer_replaces_the_mean() -> None:
    model, batch = _model(LOSS_CASES[0]), _batch("v2")
    with torch.no_grad():
        assert model(batch, 2.0).item() == pytest.approx(model.losses(batch).sum().item() / 2)


def test_queries_of_a_layout() -> None:
    layout = SequenceLayout.from_counts([3, 0, 2], [2, 0, 1], [0, 0, 1]).with_queries([2, 0, 3])
    assert layout.query_index().tolist() == [3, 4, 6, 7, 8] and layout.total_queries == 5
    assert layout.in_source().tolist() == [True, True, True, False, False, True, True, False, False]
    for counts in ([1, 1, 0], [-1, 0, 0], [1, 2]):
        with pytest.raises(ValueError, match=r"quer"):
            layout.with_queries(counts)


def test_encoder_without_a_head_gets_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = checkpoint.load(GOLDENS / "tiny", for_training=True).state
    config = Config.from_file(GOLDENS / "tiny")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("bert.")}
    model = Seq2SeqModel.from_state(config, encoder)
    assert "cls.predictions.transform.dense.weight" in caplog.text
    assert torch.isfinite(model(_batch("v2")))
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is bert\.embeddings\.LayerNorm\.bias"):
        Seq2SeqModel.from_state(config, {k: v for k, v in encoder.items() if k != "bert.embeddings.LayerNorm.bias"})
    with pytest.raises(UserError, match="has shape"):
        Seq2SeqModel.from_state(config.replace(intermediate_size=100), state)


def test_untied_decoder_is_trained_on_its_own() -> None:
    loaded = checkpoint.load(GOLDENS / "tiny", for_training=True)
    state = dict(loaded.state)
    state["cls.predictions.decoder.weight"] = torch.randn_like(state["bert.embeddings.word_embeddings.weight"])
    model = Seq2SeqModel.from_state(loaded.config.replace(tie_word_embeddings=False), state)
    model(_batch("v2")).backward()
    saved = model.checkpoint_state()
    assert torch.equal(saved["cls.predictions.decoder.weight"], state["cls.predictions.decoder.weight"])
    assert model.cls.predictions.decoder.weight.grad.norm() > 0


def test_padding_row_learns_through_the_decoder_only() -> None:
    model = _model(LOSS_CASES[0])
    embeddings = model.bert.embeddings.word_embeddings
    embeddings(torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert embeddings.weight.grad.abs().sum() == 0

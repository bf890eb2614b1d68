"""torch.compile of encoding and of a training step: one graph, the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minilm_fast import backend
from minilm_fast.config import Config
from minilm_fast.data.batching import PackedBatch, collate
from minilm_fast.data.masking import Sample
from minilm_fast.modeling.seq2seq import Seq2SeqModel

# Traces forward and backward without generating code.
COMPILER = "aot_eager"


def small_model(dropout: float, **changes: object) -> Seq2SeqModel:
    torch.manual_seed(3)
    config = Config(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        label_smoothing=0.1,
    )
    return Seq2SeqModel(config.replace(**changes) if changes else config)


def small_batch() -> PackedBatch:
    """Sequences of several lengths, pseudo-masked."""
    torch.manual_seed(4)

    def words(count: int) -> list[int]:
        return torch.randint(5, 60, (count,)).tolist()

    lengths = ((12, 4), (7, 3), (20, 1))
    return collate([Sample(words(s), words(t), words(t), list(range(t)), words(t)) for s, t in lengths])


def gradients(model: Seq2SeqModel, run: Callable[[PackedBatch], Any], batch: PackedBatch) -> list[torch.Tensor]:
    """The loss and its gradients; dropout draws the same each time."""
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    loss = run(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("changes", [{}, {"rel_pos_bins": 8, "max_rel_pos": 16}], ids=["plain", "relative positions"])
def test_encoding_is_one_graph(changes: dict[str, object]) -> None:
    encoder = small_model(0.0, **changes).bert.eval()
    compiled = torch.compile(encoder, fullgraph=True, backend=COMPILER)
    batch = small_batch()
    with torch.no_grad():
        expected = encoder(batch.input_ids, batch.position_ids, batch.layout)
        assert torch.equal(compiled(batch.input_ids, batch.position_ids, batch.layout), expected)


@pytest.mark.filterwarnings("error::UserWarning")
def test_encoding_by_triton_is_one_graph() -> None:
    """Interpreted; on a GPU the same choice of kernels is traced."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which Triton compiles for")
    encoder, batch = small_model(0.0).bert.eval(), small_batch()

    def encode() -> torch.Tensor:
        with torch.no_grad(), backend("triton"):
            return encoder(batch.input_ids, batch.position_ids, batch.layout)

    expected = encode()
    encoder.compile(fullgraph=True, backend=COMPILER)
    assert torch.equal(encode(), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_one_graph(dropout: float, precision: str) -> None:
    model, batch = small_model(dropout).train(), small_batch()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected, found = (gradients(model, run, batch) for run in (model, compiled))
    assert len(found) == len(expected) > 30
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_compiled_step_draws_its_dropout_anew() -> None:
    model, batch = small_model(0.1).train(), small_batch()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    assert len({float(compiled(batch).detach()) for _ in range(4)}) == 4

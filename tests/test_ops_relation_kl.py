"""The distillation loss: the reference against published figures, the C++ kernel against the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minilm_fast import ops
from minilm_fast.ops import SequenceLayout

GOLDENS = Path(__file__).parent / "goldens" / "distillation"
GOLDEN = json.loads((GOLDENS / "distillation.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}


class Encoder:
    """A plain BERT encoder over one padded batch that keeps each layer's query, key and value of the real tokens."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        self.state = {name: x.to(dtype).requires_grad_() for name, x in state.items()}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config["layer_norm_eps"])

    def projections(self, mask: torch.Tensor) -> list[list[torch.Tensor]]:
        """Packed query, key and value ``[tokens, hidden]`` of each layer."""
        ids, types = (torch.tensor(GOLDEN[name]) for name in ("input_ids", "token_type_ids"))
        tables = [self.state[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        x = tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][types]
        x = self._norm("embeddings.LayerNorm", x)
        found = []
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            qkv = [self._linear(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")]
            found.append([part[mask] for part in qkv])
            heads = [part.unflatten(-1, (self.config["num_attention_heads"], -1)).transpose(1, 2) for part in qkv]
            context = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
            x = self._norm(
                f"{layer}.attention.output.LayerNorm", x + self._linear(f"{layer}.attention.output.dense", context)
            )
            wide = F.gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(f"{layer}.output.LayerNorm", x + self._linear(f"{layer}.output.dense", wide))
        return found


def _golden_loss(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, Encoder]:
    mask = torch.tensor(GOLDEN["attention_mask"]).bool()
    layout = SequenceLayout.bidirectional(mask.sum(1).tolist())
    student = Encoder(GOLDENS / "student", dtype)
    parts = [
        [x.unflatten(-1, (case["relation_heads"], -1)) for x in encoder.projections(mask)[case[f"{side}_layer"] - 1]]
        for side, encoder in (("teacher", Encoder(GOLDENS / "teacher", dtype)), ("student", student))
    ]
    loss = torch.zeros((), dtype=dtype)
    for (a, b), weight in case["relations"]:
        pairs = (side[i - 1] for side in parts for i in (a, b))
        loss = loss + weight * ops.relation_kl(*pairs, layout)
    return loss, student


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_goldens(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    loss, student = _golden_loss(case, dtype)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance, abs=0)
    loss.backward()
    grad_tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for parameter, expected in load_file(GOLDENS / f"grads_{name}.safetensors").items():
        error = (student.state[parameter].grad.double() - expected).norm()
        # The key's bias shifts whole rows of query-key scores: its gradient is zero but for rounding.
        assert error <= grad_tolerance * max(expected.norm().item(), 1e-2), parameter
    for parameter, expected in case["grad_norms"].items():
        grad = student.state[parameter].grad
        norm = 0.0 if grad is None else grad.double().norm().item()
        assert norm == pytest.approx(expected, rel=grad_tolerance, abs=grad_tolerance * 1e-2), parameter

"""The attention implementation "minilm_fast" of transformers against its own sdpa and eager."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import minilm_fast.integrations.transformers as integration
from minilm_fast import ops

# The package has the operator under the module's name.
padded: Any = importlib.import_module("minilm_fast.ops.padded_attention")
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Electra")
SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways that were taken, one for each attention."""
    taken: list[str] = []
    for module, name in ((integration.ops, "padded_attention"), (integration, "_fall_back")):
        monkeypatch.setattr(module, name, recording(taken, name, getattr(module, name)))
    monkeypatch.setattr(integration, "_warned", set())
    return taken


def recording(taken: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def spy(*args: Any, **kwargs: Any) -> Any:
        taken.append(name)
        return function(*args, **kwargs)

    return spy


def make_models(name: str, *implementations: str, dtype: torch.dtype = torch.float32, **changes: Any) -> list[Any]:
    """Equal models that differ in their attention only."""
    family = next(f for f in sorted(FAMILIES, key=len, reverse=True) if name.startswith(f))
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    models = [
        getattr(transformers, name)._from_config(copy.deepcopy(config), attn_implementation=i) for i in implementations
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return [model.eval().to(dtype) for model in models]


def make_inputs(padding: str, model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 90, (5, 13)), torch.ones(5, 13, dtype=torch.int64)
    if padding == "right":
        mask[1, 7:], mask[3, 1:] = 0, 0
    elif padding == "left":
        mask[0, :5], mask[4, :12] = 0, 0
    elif padding == "holes":
        mask[1, 2:5], mask[2, 0], mask[2, 9], mask[4, ::2] = 0, 0, 0, 0
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    return {"input_ids": ids} if padding == "absent" else {"input_ids": ids, "attention_mask": mask}


def run_backward(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of the tokens, and the gradients of a loss over them."""
    model.zero_grad()
    hidden = model(**inputs).last_hidden_state
    hidden = hidden[inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()]
    torch.manual_seed(2)
    (hidden * torch.randn(hidden.shape)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["absent", "none", "right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_equal_sdpa(family: str, padding: str, calls: list[str]) -> None:
    ours, theirs = make_models(f"{family}Model", "minilm_fast", "sdpa")
    inputs = make_inputs(padding, ours)
    (hidden, gradients), (expected, expected_gradients) = run_backward(ours, inputs), run_backward(theirs, inputs)
    assert calls == ["padded_attention"] * 2
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_are_found_once_a_pass_and_anew_in_the_next(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller changes its own mask in place, which may be bool already."""
    found: list[int] = []
    plain = padded._Packing
    monkeypatch.setattr(padded, "_Packing", lambda *args: (found.append(args[2].sum().item()), plain(*args))[1])
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa", is_decoder=causal)
    inputs = make_inputs("right", ours)
    mask = inputs["attention_mask"] = inputs["attention_mask"].bool()
    options = {"use_cache": False} if causal else {}
    for _ in range(2):
        outputs = [model(**inputs, **options).last_hidden_state for model in (ours, theirs)]
        outputs[0][mask].sum().backward()
        torch.testing.assert_close(outputs[0][mask], outputs[1][mask], rtol=1e-5, atol=1e-5)
        mask[2, 6:] = False
    assert found == [47, 40]


@pytest.mark.parametrize("padding", ["absent", "right", "left", "holes"])
def test_causal_decoder(padding: str, calls: list[str]) -> None:
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa", is_decoder=True)
    inputs = make_inputs(padding, ours)
    (hidden, gradients), (expected, expected_gradients) = run_backward(ours, inputs), run_backward(theirs, inputs)
    assert calls == ["padded_attention"] * 2
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_generation(family: str, calls: list[str]) -> None:
    """The prompt goes through the operator, steps with a cache through sdpa; left padding is right."""
    name = {"Bert": "BertLMHeadModel", "Roberta": "RobertaForCausalLM"}[family]
    ours, theirs = make_models(name, "minilm_fast", "sdpa", is_decoder=True)
    inputs = make_inputs("left", ours)
    found, expected = (
        m.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=m.config.pad_token_id)
        for m in (ours, theirs)
    )
    assert torch.equal(found, expected) and found.shape[1] == 21
    assert calls[:2] == ["padded_attention"] * 2 and set(calls[2:]) == {"_fall_back"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(dtype: torch.dtype, tolerance: float, calls: list[str]) -> None:
    (ours,) = make_models("BertModel", "minilm_fast", dtype=dtype)
    (exact,) = make_models("BertModel", "sdpa")
    inputs = make_inputs("holes", ours)
    hidden, gradients = run_backward(ours, inputs)
    expected, expected_gradients = run_backward(exact, inputs)
    assert hidden.dtype == dtype and calls == ["padded_attention"] * 2
    torch.testing.assert_close(hidden.float(), expected, rtol=tolerance, atol=tolerance)
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.value.weight"):
        difference = (gradients[name].float() - expected_gradients[name]).norm()
        assert difference <= tolerance * 2 * expected_gradients[name].norm()


def test_autocast() -> None:
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa")
    inputs = make_inputs("right", ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, expected = run_backward(ours, inputs)[0], run_backward(theirs, inputs)[0]
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=0.05, atol=0.05)


def test_dropout_is_on_in_training_only_and_right_in_the_mean() -> None:
    changes = {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0, "num_hidden_layers": 1}
    config = transformers.BertConfig(**{**SIZES, **changes}, attn_implementation="minilm_fast")
    torch.manual_seed(0)
    attention: Any = transformers.BertModel(config).encoder.layer[0].attention.self
    hidden = torch.randn(2, 9, 64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:] = False
    with torch.no_grad():
        exact = attention.eval()(hidden, mask)[0]
        attention.train()
        torch.manual_seed(3)
        first = attention(hidden, mask)[0]
        torch.manual_seed(3)
        assert torch.equal(attention(hidden, mask)[0], first)
        draws = torch.stack([attention(hidden, mask)[0] for _ in range(1000)])
    assert not torch.equal(draws[0], first) and not torch.equal(draws[0], draws[1])
    assert not draws[:, ~mask].any()
    # Six standard errors of the mean.
    bound = 6 * draws.std(0) / 1000**0.5 + 1e-6
    assert bool(((draws.mean(0) - exact).abs() <= bound).all())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_dropout(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        (model,) = make_models("BertModel", "minilm_fast", hidden_dropout_prob=0.0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        gradients.append(run_backward(model.train(), make_inputs("right", model))[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_compiles_without_graph_breaks(calls: list[str]) -> None:
    """In training, with dropout; the compiled graph draws the same seeds."""
    (model,) = make_models("BertModel", "minilm_fast", hidden_dropout_prob=0.0, num_hidden_layers=1)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = make_inputs("holes", model)
    torch.manual_seed(0)
    expected, expected_gradients = run_backward(model, inputs)
    torch.manual_seed(0)
    hidden, gradients = run_backward(compiled, inputs)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    names = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(names[name], gradient, rtol=1e-4, atol=1e-4)


def test_probabilities_are_eagers(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = make_models("BertModel", "minilm_fast", "eager")
    inputs = make_inputs("right", ours)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        found, expected = (m(**inputs, output_attentions=True) for m in (ours, theirs))
    mask = inputs["attention_mask"].bool()
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.last_hidden_state[mask], expected.last_hidden_state[mask])
    assert set(calls) == {"_fall_back"}
    assert caplog.text.count("output_attentions") == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_matrix_of_the_user(dtype: torch.dtype, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa")
    torch.manual_seed(0)
    sees = (torch.rand(5, 1, 13, 13) < 0.5) | torch.eye(13, dtype=torch.bool)
    matrix = sees if dtype == torch.bool else torch.zeros(sees.shape).masked_fill(~sees, -1e9)
    inputs = {**make_inputs("absent", ours), "attention_mask": matrix}
    with torch.no_grad():
        found, expected = (m(**inputs).last_hidden_state for m in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert set(calls) == {"_fall_back"} and "the mask is a matrix" in caplog.text


@pytest.mark.parametrize("same_length", [True, False])
def test_cross_attention(same_length: bool, calls: list[str]) -> None:
    """Of another sequence of the same length too, whose padding is not that of the queries."""
    changes = {"is_decoder": True, "add_cross_attention": True}
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa", **changes)
    inputs = make_inputs("right", ours)
    length = 13 if same_length else 6
    torch.manual_seed(4)
    inputs["encoder_hidden_states"] = torch.randn(5, length, 64)
    inputs["encoder_attention_mask"] = torch.ones(5, length, dtype=torch.int64)
    inputs["encoder_attention_mask"][:, 4:] = 0
    with torch.no_grad():
        found, expected = (m(**inputs).last_hidden_state for m in (ours, theirs))
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert calls == ["padded_attention", "_fall_back"] * 2


def test_double_precision_is_left_to_sdpa(calls: list[str]) -> None:
    ours, theirs = make_models("BertModel", "minilm_fast", "sdpa", dtype=torch.float64)
    inputs = make_inputs("holes", ours)
    with torch.no_grad():
        found, expected = (m(**inputs).last_hidden_state for m in (ours, theirs))
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask])
    assert set(calls) == {"_fall_back"}


def test_arguments_that_nothing_computes_raise() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="does not support softcap"):
        integration.attention(torch.nn.Identity(), q, q, q, None, softcap=1.0)


def test_a_sequence_of_padding_only_is_zero() -> None:
    q = torch.randn(2, 3, 2, 8, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    out = ops.padded_attention(q, q, q, mask)
    out.sum().backward()
    assert not out[~mask].any() and q.grad is not None and not q.grad[~mask].any()
    assert torch.isfinite(out).all() and torch.isfinite(q.grad).all()


def test_padding_is_never_read() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 16) for _ in range(3))
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    expected = ops.padded_attention(q, k, v, mask)
    for x in (q, k, v):
        x[~mask] = float("nan")
    assert torch.equal(ops.padded_attention(q, k, v, mask), expected)


def test_operator_passes_torchs_own_checks() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 2, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for causal in (False, True):
        arguments = (q, k, v, mask, causal, 0.3, 0.2, torch.tensor([7]))
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(torch.ops.minilm_fast.padded_attention.default, arguments, test_utils=utilities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 4, 2, 8)}, "must be one shape"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, "mask must be bool"),
        ({"mask": torch.ones(1, 3)}, "mask must be bool"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_wrong_arguments_of_the_operator(changes: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match=message):
        ops.padded_attention(**{"q": q, "k": q, "v": q, **changes})

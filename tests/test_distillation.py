"""The distillation loss of whole models: against published figures, and ours against transformers'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilm_fast import checkpoint
from minilm_fast.config import Config
from minilm_fast.data.token_batch import TokenBatch
from minilm_fast.distillation import Distiller, FrozenEncoder, Relation, parse_relations
from minilm_fast.distillation.sides import SideInputs
from minilm_fast.errors import UserError
from minilm_fast.modeling.encoder import Encoder
from minilm_fast.ops import SequenceLayout

GOLDENS = Path(__file__).parent / "goldens" / "distillation"
GOLDEN = json.loads((GOLDENS / "distillation.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
LETTERS = " qkv"


pytestmark = pytest.mark.usefixtures("one_thread")


def encoder(folder: Path) -> Encoder:
    loaded = checkpoint.load(folder, for_training=True)
    model = Encoder(loaded.config)
    model.load_state_dict({n.removeprefix("bert."): x for n, x in loaded.state.items() if n.startswith("bert.")})
    return model.eval()


def hugging_face(folder: Path) -> torch.nn.Module:
    from transformers import BertModel

    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval()


def frozen(folder: Path, layer: int | None = None, dtype: str = "fp32", device: str = "cpu") -> FrozenEncoder:
    loaded = checkpoint.load(folder)
    return FrozenEncoder(loaded.config, loaded.state, layer=layer, dtype=dtype, device=device)


def padded_batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: torch.tensor(GOLDEN[name], device=device) for name in ("input_ids", "attention_mask")}


def packed_batch(device: str = "cpu") -> TokenBatch:
    return TokenBatch.from_padded(**padded_batch(device))


def relations_of(case: dict[str, Any]) -> list[Relation]:
    return [Relation(LETTERS[a], LETTERS[b], weight) for (a, b), weight in case["relations"]]


def distiller(case: dict[str, Any], teacher: Any, student: Any) -> Distiller:
    return Distiller(
        teacher,
        student,
        relations_of(case),
        relation_heads=case["relation_heads"],
        teacher_layer=case["teacher_layer"],
        student_layer=case["student_layer"],
    )


def check_gradients(case: dict[str, Any], student: torch.nn.Module, tolerance: float = 1e-4) -> None:
    grads = {name: p.grad for name, p in student.named_parameters()}
    for name, expected in case["grad_norms"].items():
        norm = 0.0 if grads[name] is None else grads[name].double().norm().item()
        # The key's bias shifts whole rows of query-key scores: its gradient is zero but for rounding.
        assert norm == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-2), name
    for name, expected in load_file(GOLDENS / f"grads_{case['name']}.safetensors").items():
        error = (grads[name].double().cpu() - expected).norm()
        assert error <= tolerance * max(expected.norm().item(), 1e-2), name


@pytest.mark.parametrize("teacher_kind", ["encoder", "frozen", "hugging_face"])
@pytest.mark.parametrize("name", CASES)
def test_goldens_through_our_encoder(name: str, teacher_kind: str) -> None:
    compare_golden(name, teacher_kind)


def compare_golden(name: str, teacher_kind: str, device: str = "cpu") -> None:
    """The loss of a golden case, its relations and gradients."""
    case = CASES[name]
    folder = GOLDENS / "teacher"
    teacher: Any = {
        "encoder": lambda: encoder(folder).to(device),
        "frozen": lambda: frozen(folder, case["teacher_layer"], device=device),
        "hugging_face": lambda: hugging_face(folder).to(device),
    }[teacher_kind]()
    student = encoder(GOLDENS / "student").to(device)
    result = distiller(case, teacher, student)(packed_batch(device))
    assert result.loss.item() == pytest.approx(case["loss"], rel=1e-5)
    parts = sum(r.weight * result.relations[r.name] for r in relations_of(case))
    assert float(parts) == pytest.approx(case["loss"], rel=1e-5)
    result.loss.backward()
    check_gradients(case, student)


@pytest.mark.parametrize("name", CASES)
def test_goldens_with_a_hugging_face_student(name: str) -> None:
    case = CASES[name]
    student = hugging_face(GOLDENS / "student")
    result = distiller(case, hugging_face(GOLDENS / "teacher"), student)(padded_batch())
    assert result.loss.item() == pytest.approx(case["loss"], rel=1e-5)
    result.loss.backward()
    check_gradients(case, student)
    assert len(student.encoder.layer) == 2


def test_presets_are_the_papers() -> None:
    case = CASES["v1_last"]
    pair = encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student")
    assert Distiller(*pair, "v1")(packed_batch()).loss.item() == pytest.approx(case["loss"], rel=1e-5)
    case = CASES["v2_qkv_same_heads"]
    v2 = Distiller(*pair, "v2", relation_heads=case["relation_heads"], teacher_layer=case["teacher_layer"])
    assert v2(packed_batch()).loss.item() == pytest.approx(case["loss"], rel=1e-5)


def test_the_distiller_is_the_students_module() -> None:
    teacher, student = encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student")
    module = Distiller(teacher.train(), student)
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    module.train()
    module(packed_batch()).loss.backward()
    assert student.training and not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    unused = student.encoder.layer[-1].output.dense.weight, student.encoder.layer[-1].attention.output.dense.weight
    assert all(p.grad is None for p in unused)
    module.double()
    assert teacher.embeddings.LayerNorm.weight.dtype == torch.float64


def test_equal_models_have_no_loss() -> None:
    model = encoder(GOLDENS / "student")
    loss = Distiller(encoder(GOLDENS / "student"), model, "v2", relation_heads=4)(packed_batch())
    assert loss.loss.item() == pytest.approx(0, abs=1e-6)
    assert all(value.item() >= -1e-7 for value in loss.relations.values())


def test_bf16_teacher_is_near() -> None:
    student = encoder(GOLDENS / "student")
    exact = Distiller(frozen(GOLDENS / "teacher"), student)(packed_batch()).loss.item()
    near = Distiller(frozen(GOLDENS / "teacher", dtype="bf16"), student)(packed_batch()).loss.item()
    assert near != exact and near == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_vectors_are_of_the_dtype_of_the_teacher(dtype: str) -> None:
    """Under autocast both sides are bf16: only then does the loss run on matrix tiles."""
    vectors = frozen(GOLDENS / "teacher", dtype=dtype).vectors(SideInputs(packed_batch()), 3, ["q", "v"])
    assert {x.dtype for x in vectors.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}


def _small(family: str) -> Any:
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    classes = {
        "roberta": ("RobertaConfig", "RobertaForMaskedLM"),
        "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
        "electra": ("ElectraConfig", "ElectraForMaskedLM"),
        "bert": ("BertConfig", "BertForSequenceClassification"),
    }
    config, model = (getattr(transformers, name) for name in classes[family])
    extra = {"embedding_size": 16} if family == "electra" else {}
    torch.manual_seed(0)
    return model(config(**sizes, **extra)).eval()


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_ours_equals_the_hugging_face_adapter(family: str, tmp_path: Path) -> None:
    """Loaded from what transformers wrote, our teacher gives what the adapter gives; heads of models do not matter."""
    model = _small(family)
    model.save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path, fold_token_types=True)
    student = Encoder(
        Config(vocab_size=50, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ).eval()
    ids = torch.randint(5, 50, (3, 11))
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5, [1] + [0] * 10])
    pad = model.config.pad_token_id
    inputs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    settings: dict[str, Any] = {"relations": "qk:0.5,kv,vv:2", "relation_heads": 6, "teacher_layer": 2}
    theirs = Distiller(model, student, **settings)(inputs)
    settings["teacher_layer"] = None
    ours = Distiller(FrozenEncoder(loaded.config, loaded.state, layer=2), student, **settings)(inputs)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-4)
    for name, value in theirs.relations.items():
        assert ours.relations[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_a_sequence_to_sequence_mask_holds_for_the_relations() -> None:
    """microsoft/unilm#198: what the attention may not see, the relations do not compare."""
    teacher, student = encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student")
    ids = torch.tensor([8, 9, 10, 11, 12, 13], dtype=torch.int32)
    positions = torch.arange(6, dtype=torch.int32)

    def loss(last: int) -> float:
        layout = SequenceLayout.seq2seq([3], [3])
        changed = ids.clone()
        changed[-1] = last
        batch = TokenBatch(changed, positions, layout)
        module = Distiller(teacher, student, reduction="sum")
        sides = module.teacher_vectors(batch), module.student_vectors(batch)
        # Of the last row nothing is left, so the rest must not depend on the last token.
        shorter = SequenceLayout.seq2seq([3], [2])
        return module.compare(*({n: x[:5] for n, x in side.items()} for side in sides), shorter).loss.item()

    assert loss(13) == pytest.approx(loss(40), rel=1e-6)
    batch = TokenBatch(ids, positions, SequenceLayout.seq2seq([3], [3]))
    with pytest.raises(ValueError, match="bidirectional"):
        Distiller(hugging_face(GOLDENS / "teacher"), student)(batch)


def test_gradient_accumulation_in_a_loop_of_ones_own() -> None:
    teacher, student = encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student")
    module = Distiller(teacher, student, "v2", relation_heads=6)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = module(packed_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and math.isfinite(losses[-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relation_heads": 5}, "5 relation heads do not divide the teacher's hidden size of 48"),
        ({"relation_heads": 16}, "16 relation heads do not divide the student's hidden size of 24"),
        ({"relation_heads": 0}, "0 relation heads"),
        ({"teacher_layer": 4}, "teacher layer 4: the teacher has layers 1 to 3"),
        ({"student_layer": 0}, "student layer 0: the student has layers 1 to 2"),
        ({"relations": ()}, "no relation"),
        ({"relations": "qk,qk:2"}, "relation qk is given twice"),
    ],
)
def test_pairs_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distiller(encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student"), **settings)


def test_other_models_that_do_not_fit() -> None:
    teacher = encoder(GOLDENS / "teacher")
    config = teacher.config.replace(vocab_size=teacher.config.vocab_size + 1)
    with pytest.raises(UserError, match="vocabularies differ"):
        Distiller(teacher, Encoder(config))
    with pytest.raises(UserError, match="attention heads"):
        Distiller(teacher, Encoder(teacher.config.replace(num_attention_heads=3)))
    with pytest.raises(UserError, match="neither"):
        Distiller(teacher, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="layer 3 was packed"):
        frozen(GOLDENS / "teacher").vectors(packed_batch(), 2, ["q"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layers 1 to 3"):
        frozen(GOLDENS / "teacher", 7)


@pytest.mark.parametrize("text", ["", "qk:0", "qx", "qk:nan", "q", "qk:1;vv:1", "v3", "qk:inf"])
def test_relation_texts_that_make_no_sense(text: str) -> None:
    with pytest.raises(UserError, match="relation"):
        parse_relations(text)


def test_padding_on_the_left_is_refused() -> None:
    with pytest.raises(ValueError, match="padding must come after"):
        TokenBatch.from_padded(torch.ones(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]]))
    batch = packed_batch()
    ids, mask = batch.padded(pad_id=0)
    assert torch.equal(ids, torch.tensor(GOLDEN["input_ids"]))
    assert torch.equal(mask, torch.tensor(GOLDEN["attention_mask"]))
    types = {"token_type_ids": torch.ones(4, 19, dtype=torch.long)}
    with pytest.raises(ValueError, match="token_type_ids"):
        Distiller(encoder(GOLDENS / "teacher"), encoder(GOLDENS / "student"))(padded_batch() | types)

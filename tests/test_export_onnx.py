"""ONNX files: equal to our encoder and to transformers in ONNX Runtime, for every layout, head and pooling."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402

from minilm_fast import checkpoint, export_onnx  # noqa: E402
from minilm_fast.config import Config  # noqa: E402
from minilm_fast.data.token_batch import TokenBatch  # noqa: E402
from minilm_fast.errors import UserError  # noqa: E402
from minilm_fast.export_onnx import TASKS, main  # noqa: E402
from minilm_fast.modeling.classification import SequenceClassifier  # noqa: E402
from minilm_fast.modeling.encoder import Encoder  # noqa: E402
from minilm_fast.modeling.seq2seq import Seq2SeqModel  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"
LAYOUTS = json.loads((GOLDENS / "layouts" / "layouts.json").read_text())
LENGTHS = (7, 1, 9, 4)
TOLERANCE = 1e-5


def random_ids(vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids padded on the right to the longest, and the mask of the real ones."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    # What stands in the padding must not matter.
    return rng.integers(0, vocabulary, mask.shape), mask


def random_types(types: int, mask: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).integers(0, types, mask.shape) * mask


def run(file: Path, *, types: int = 2, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Outputs of a file in ONNX Runtime, and the ids, mask and types that went in."""
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    vocabulary = onnx_vocabulary(file)
    ids, mask = random_ids(vocabulary, seed)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": random_types(types, mask)}
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: feed[name] for name in names}), ids, mask, feed["token_type_ids"]


def onnx_vocabulary(file: Path) -> int:
    model = onnx.load(file)
    (words,) = (w for w in model.graph.initializer if w.name == "bert.embeddings.word_embeddings.weight")
    return int(words.dims[0])


def packed(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> tuple[TokenBatch, torch.Tensor]:
    batch = TokenBatch.from_sequences([row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)])
    return batch, torch.tensor(types[mask.astype(bool)], dtype=torch.int32)


def ours(config: Config, state: dict[str, torch.Tensor], batch: TokenBatch, types: torch.Tensor) -> np.ndarray:
    """Last hidden states of the real tokens by our encoder."""
    encoder = Encoder(config).eval()
    own = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    encoder.load_state_dict({name: own[name] for name in encoder.state_dict()})
    with torch.no_grad():
        return encoder(batch.input_ids, batch.position_ids, batch.layout, types).numpy()


def random_state(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that every part of the network shows in its outputs."""
    generator = torch.Generator().manual_seed(seed)
    network = Seq2SeqModel(config)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in network.checkpoint_state().items()
    }


SMALL = Config(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24,
)  # fmt: skip


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["layout"])
def test_every_layout_equals_ours(case, tmp_path, quiet):
    file, config_file = tmp_path / "model.onnx", tmp_path / "config.json"
    config_file.write_text(json.dumps({**case["hf_config"], "model_type": case["model_type"]}))
    export_onnx.export_onnx(
        GOLDENS / case["file"], file, config_name=config_file, task="hidden-states", model_type=case["model_type"]
    )
    loaded = checkpoint.load(
        GOLDENS / case["file"], config=config_file, model_type=case["model_type"], fold_token_types=True
    )
    types = max(1, loaded.config.type_vocab_size)
    (found,), ids, mask, token_types = run(file, types=types)
    if loaded.config.embedding_size != loaded.config.hidden_size:
        expected = electra(loaded, ids, mask, token_types)
    else:
        expected = ours(loaded.config, loaded.state, *packed(ids, mask, token_types))
    assert np.abs(found[mask.astype(bool)] - expected).max() < TOLERANCE


def electra(loaded, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Last hidden states of an ELECTRA with narrow embeddings by transformers."""
    transformers = pytest.importorskip("transformers")
    values = {**loaded.config.to_dict(), "model_type": "electra"}
    model = transformers.ElectraModel(transformers.ElectraConfig(**values)).eval()
    state = {name.removeprefix("bert."): tensor for name, tensor in loaded.state.items() if name.startswith("bert.")}
    model.load_state_dict(state, strict=False)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        hidden = model(**{name: torch.tensor(value) for name, value in given.items()}).last_hidden_state
    return hidden.numpy()[mask.astype(bool)]


VARIANTS = (
    *({"hidden_act": name} for name in ("gelu_new", "relu", "silu")),
    {"rel_pos_bins": 8, "max_rel_pos": 5},
    {"type_vocab_size": 0},
)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_equal_ours(changes, tmp_path):
    config = SMALL.replace(**changes)
    state = random_state(config)
    checkpoint.save(tmp_path / "model", config, state)
    export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx", task="hidden-states")
    (found,), ids, mask, types = run(tmp_path / "model.onnx")
    expected = ours(config, state, *packed(ids, mask, types))
    assert np.abs(found[mask.astype(bool)] - expected).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings(pooling, normalize, tmp_path):
    state = random_state(SMALL)
    checkpoint.save(tmp_path / "model", SMALL, state)
    export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx", pooling=pooling, normalize=normalize)
    (found,), ids, mask, types = run(tmp_path / "model.onnx")
    hidden = np.split(ours(SMALL, state, *packed(ids, mask, types)), np.cumsum(LENGTHS)[:-1])
    expected = np.stack([rows.mean(0) if pooling == "mean" else rows[0] for rows in hidden])
    if normalize:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(found - expected).max() < TOLERANCE
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert about["pooling"] == pooling and about["normalize"] == str(normalize).lower()


@pytest.mark.parametrize(
    ("tied", "changes"),
    [(True, {}), (False, {}), (True, {"model_type": "roberta", "type_vocab_size": 0, "hidden_act": "relu"})],
    ids=str,
)
def test_masked_lm(tied, changes, tmp_path):
    values = {**SMALL.to_dict(), "pad_token_id": 0, **changes}
    config = Config.from_dict(values, model_type=values["model_type"]).replace(tie_word_embeddings=tied)
    network = Seq2SeqModel.from_state(config, random_state(config)).eval()
    checkpoint.save(tmp_path / "model", config, network.checkpoint_state())
    export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx", task="masked-lm")
    (found,), ids, mask, types = run(tmp_path / "model.onnx")
    batch, kinds = packed(ids, mask, types)
    predictions = network.cls.predictions
    with torch.no_grad():
        hidden = predictions.transform(network.bert(batch.input_ids, batch.position_ids, batch.layout, kinds))
        matrix = predictions.matrix(network.bert.embeddings.word_embeddings.weight)
        expected = nn.functional.linear(hidden, matrix, predictions.bias).numpy()
    assert found.shape == (len(LENGTHS), max(LENGTHS), config.vocab_size)
    assert np.abs(found[mask.astype(bool)] - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_sequence_classification(family, tmp_path):
    config = Config.from_dict({**SMALL.to_dict(), "pad_token_id": 0}, model_type=family)
    config = config.replace(extra={"id2label": {"0": "no", "1": "yes", "2": "perhaps"}})
    network = SequenceClassifier(config).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    checkpoint.save(tmp_path / "model", config, network.checkpoint_state())
    export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx", task="sequence-classification")
    (found,), ids, mask, types = run(tmp_path / "model.onnx")
    batch, kinds = packed(ids, mask, types)
    with torch.no_grad():
        expected = network(batch, token_type_ids=kinds).numpy()
    assert np.abs(found - expected).max() < TOLERANCE
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(about["id2label"])["2"] == "perhaps"


HEADS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Electra"])
def test_heads_equal_transformers(family, task, tmp_path, quiet):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    # ELECTRA's embeddings are narrow, as in the small model.
    extra = {"embedding_size": 20} if family == "Electra" else {"type_vocab_size": 2 if family == "Bert" else 1}
    values = {**SMALL.to_dict(), "num_labels": 5, **extra, "initializer_range": 0.3}
    values |= {"pad_token_id": 1, "max_position_embeddings": 26} if "oberta" in family else {}
    if task == "question-answering":
        values["num_labels"] = 2
    for key in ("model_type", "minilm_fast"):
        values.pop(key, None)
    network = getattr(transformers, family + HEADS[task])(getattr(transformers, f"{family}Config")(**values)).eval()
    network.save_pretrained(tmp_path / "model")
    export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx", task=task)
    outputs, ids, mask, types = run_avoiding(tmp_path / "model.onnx", pad=values["pad_token_id"])
    given = {"input_ids": ids, "attention_mask": mask, **({} if "oberta" in family else {"token_type_ids": types})}
    with torch.no_grad():
        results = network(**{name: torch.tensor(value) for name, value in given.items()})
    expected = [results.start_logits, results.end_logits] if task == "question-answering" else [results.logits]
    assert len(outputs) == len(expected)
    for found, wanted in zip(outputs, (tensor.numpy() for tensor in expected), strict=True):
        real = mask.astype(bool) if found.shape[:2] == mask.shape else ...
        assert np.abs(found[real] - wanted[real]).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


def run_avoiding(file: Path, pad: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Like :func:`run`; the padding id stands in the padding alone, since RoBERTa of transformers counts by it."""
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ids, mask = random_ids(onnx_vocabulary(file) - 2)
    ids = np.where(mask.astype(bool), ids + 2, pad)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": random_types(2, mask)}
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: feed[name] for name in names}), ids, mask, feed["token_type_ids"]


def test_batch_and_length_are_free_and_nothing_of_ours_is_inside(tmp_path):
    checkpoint.save(tmp_path / "model", SMALL, random_state(SMALL))
    file = tmp_path / "model.onnx"
    assert export_onnx.export_onnx(tmp_path / "model", file) == [file]
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.version for entry in model.opset_import] == [17]
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 24)):
        ones = np.ones((batch, length), dtype=np.int64)
        feed = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ones)
        assert session.run(None, feed)[0].shape == (batch, SMALL.hidden_size)


def test_large_weights_lie_beside_the_model(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "model", SMALL, random_state(SMALL))
    file, large = tmp_path / "model.onnx", tmp_path / "large.onnx"
    export_onnx.export_onnx(tmp_path / "model", file)
    monkeypatch.setattr(export_onnx, "SINGLE_FILE_LIMIT", 1000)
    assert export_onnx.export_onnx(tmp_path / "model", large) == [large, tmp_path / "large.onnx.data"]
    session = runtime.InferenceSession(large, providers=["CPUExecutionProvider"])
    ids, mask = random_ids(SMALL.vocab_size)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": random_types(2, mask)}
    (found,) = session.run(None, feed)
    assert np.array_equal(found, runtime.InferenceSession(file).run(None, feed)[0])
    assert large.stat().st_size < file.stat().st_size / 2
    monkeypatch.undo()
    export_onnx.export_onnx(tmp_path / "model", large)
    assert sorted(path.name for path in tmp_path.glob("large*")) == ["large.onnx"]


@pytest.mark.parametrize("task", [task for task in TASKS if task in HEADS])
def test_missing_head_is_one_line_and_nothing_is_written(task, tmp_path, capsys):
    state = {name: t for name, t in random_state(SMALL).items() if name.startswith("bert.")}
    checkpoint.save(tmp_path / "model", SMALL, state)
    file = tmp_path / "model.onnx"
    assert main(["--model_path", str(tmp_path / "model"), "--output_file", str(file), "--task", task]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"--task {task}: the checkpoint has no " in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--output_file", "no-such-folder/model.onnx"], "no-such-folder"),
        (["--output_file", "."], "is a folder"),
        (["--output_file", "m.onnx", "--task", "masked-lm", "--normalize"], "--normalize are for --task embeddings"),
        (["--output_file", "m.onnx", "--model_path", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_arguments(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--model_path" in arguments else ["--model_path", str(GOLDENS / "tiny")]
    assert main([*given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line
    assert list(tmp_path.iterdir()) == []


def test_causal_models_are_refused(tmp_path):
    from minilm_fast import CausalLM

    CausalLM(Config.from_file(GOLDENS / "tiny")).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the configuration says is_decoder; only bidirectional models are exported"):
        export_onnx.export_onnx(tmp_path / "model", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_unknown_task_from_python(tmp_path):
    with pytest.raises(UserError, match="--task must be one of"):
        export_onnx.export_onnx(GOLDENS / "tiny", tmp_path / "model.onnx", task="translation")


def test_command_line(tmp_path):
    file = tmp_path / "model.onnx"
    command = [sys.executable, "-m", "minilm_fast.export_onnx", "--model_path", str(GOLDENS / "tiny_relpos")]
    done = subprocess.run([*command, "--output_file", str(file), "--normalize"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"written: {file}"]
    (found,), *_ = run(file)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-5)

